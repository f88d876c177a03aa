// Decision models on a GPU, in one launch: a few linear layers with ReLU between them, and whether any row goes on.
//
// A layer needs all of the layer before it, and no block may wait for another, so what can be spread over the GPU in
// one launch are two layers: a block has 16 units of the first layer (64 if the layer is small) for 4 or 8 rows, and
// multiplies what they give by the 16 columns of the second layer's weight that belong to them. Its sums are a part of
// every output of the second layer. Parts are joined in two steps of about the square root of their number each, by the
// block that arrives last: first at a group of parts, then at the groups. The last block of all has the second layer
// of its rows, and goes through what is left alone, a warp to an output. In the models that are published that is the
// last layer of a single output. The block that finishes the last rows looks whether any score is above the threshold.
//
// Bytes: the weights of the first two layers once per block of rows, from memory the first time and then from the L2
// cache; those of later layers once per row; 8 * splits * outputs of the second layer per row for the parts, through
// the L2 cache. 2048-1024-512-1 in bfloat16 has 5.2 MB of weights, in 64 blocks for each 4 or 8 rows, which ask for
// 32 KB at a time, 16 bytes to a lane and load: with few rows memory and its latency are the roof. From 8 rows on it is
// the shared memory that hands out activations, one load of 16 bytes for 16 products. Tensor cores would be faster from
// some tens of rows on, which is more than a level of most draft trees has, and would round activations, which stay in
// float32 here.
//
// Sums are made in an order that only the layers' shapes decide. A row's score does not depend on other rows.
//
// A warp has 4 units and half of the inputs. Its lanes have packs of 16 bytes of the weights' rows; where rows don't
// start at multiples of 16 bytes, single elements. Activations are in shared memory, up to 1,024 inputs at a time.
#pragma once

#include "common/cuda/last_block.cuh"
#include "early_exit/cuda/mlp_launch.h"

namespace specdec::cuda {

constexpr int kMlpThreads = 256, kMlpWarps = kMlpThreads / kWarpSize;
constexpr int kMlpUnits = 16, kMlpMaxUnits = 64;  // of a step, of a block
constexpr int kMlpWarpUnits = 4;
constexpr int kMlpParts = kMlpWarps * kMlpWarpUnits / kMlpUnits;  // of the inputs
constexpr int kMlpPacks = 2;                                      // of a unit's weights, that a lane has at once
constexpr int kMlpMaxChunk = kWarpSize * 8 * kMlpPacks * kMlpParts;

// The block's dynamic shared memory.
template <int kRows>
struct MlpShared {
  float* x;         // [kRows, a chunk of the inputs]
  float* sums;      // [kMlpParts, kMlpUnits, kRows]
  float* hidden;    // [units, kRows]
  uint32_t* slots;  // of the reducer

  __device__ MlpShared() {
    SharedMemory memory;
    x = memory.take<float>(kRows * kMlpMaxChunk);
    sums = memory.take<float>(kMlpParts * kMlpUnits * kRows);
    hidden = memory.take<float>(kMlpMaxUnits * kRows);
    slots = memory.take<uint32_t>(TeamReducer::kWords);
  }
  static constexpr uint32_t bytes() {
    return SharedMemory::bytes<float>(kRows * kMlpMaxChunk) +
           SharedMemory::bytes<float>(kMlpParts * kMlpUnits * kRows) +
           SharedMemory::bytes<float>(kMlpMaxUnits * kRows) + SharedMemory::bytes<uint32_t>(TeamReducer::kWords);
  }
};

__host__ __device__ __forceinline__ int32_t mlp_groups(const MlpLaunch& launch) {
  return (launch.splits + launch.fan - 1) / launch.fan;
}

// float32 numbers of scratch for a block of rows: parts, parts of groups, and the outputs of two layers.
__host__ __device__ __forceinline__ int64_t mlp_floats(const MlpLaunch& launch) {
  return int64_t(launch.splits + mlp_groups(launch) + 2) * launch.row_block * launch.wide;
}

// What a block works on.
template <int kRows>
struct MlpBlock {
  const MlpLaunch& launch;
  const MlpParams& p;
  int32_t place, split;     // the block of rows in this launch, and which part of it
  int32_t first_row, rows;  // of these, so many exist
  float* scratch;

  __device__ explicit MlpBlock(const MlpLaunch& launch)
      : launch(launch),
        p(launch.call),
        place(int32_t(blockIdx.x) / launch.splits),
        split(int32_t(blockIdx.x) % launch.splits),
        first_row((launch.first_block + place) * kRows),
        rows(min(kRows, p.rows - first_row)),
        scratch(reinterpret_cast<float*>(launch.scratch) + place * mlp_floats(launch)) {}

  // [kRows, outputs of the second layer] each.
  __device__ float* part(int32_t index) const { return scratch + int64_t(index) * kRows * launch.wide; }
  __device__ float* group(int32_t index) const { return part(launch.splits + index); }
  __device__ float* layer(int32_t index) const { return group(mlp_groups(launch) + index % 2); }
  __device__ int32_t* counters() const { return launch.counters + 1 + place * (mlp_groups(launch) + 1); }
};

// Where input k of a chunk lies in a row of shared memory: lanes that read four numbers each read neighbouring fours.
template <int kPack>
__device__ __forceinline__ int place_of_input(int k) {
  if constexpr (kPack < 8) return k;
  return k / (kWarpSize * 8) * (kWarpSize * 8) + k % 8 / 4 * (kWarpSize * 4) + k % (kWarpSize * 8) / 8 * 4 + k % 4;
}

template <int kRows, int kPack, class Feature>
__device__ __forceinline__ void load_features(float* x, const MlpBlock<kRows>& block, int32_t begin, int32_t chunk) {
  const MlpParams& p = block.p;
  const Feature* features = static_cast<const Feature*>(p.features) + block.first_row * p.features_stride_row;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    for (int32_t k = threadIdx.x; k < chunk; k += kMlpThreads) {
      const bool exists = row < block.rows && begin + k < p.inputs;
      const float value = exists ? to_float(features[row * p.features_stride_row + begin + k]) : 0.0f;
      x[row * kMlpMaxChunk + place_of_input<kPack>(k)] = value;
    }
  }
}

template <int kRows, int kPack>
__device__ __forceinline__ void load_features(float* x, const MlpBlock<kRows>& block, int32_t begin, int32_t chunk) {
  switch (block.p.features_dtype) {
    case DType::kFloat32:
      load_features<kRows, kPack, float>(x, block, begin, chunk);
      break;
    case DType::kBFloat16:
      load_features<kRows, kPack, BFloat16>(x, block, begin, chunk);
      break;
    case DType::kFloat16:
      load_features<kRows, kPack, Float16>(x, block, begin, chunk);
      break;
  }
}

// Sums of kCount values over the lanes of a warp. Lane l returns that of value l / (kWarpSize / kCount).
template <int kBit, int kCount, int kSize>
__device__ __forceinline__ float sum_over_lanes(float (&values)[kSize], int lane) {
  if constexpr (kBit == 0) {
    return values[0];
  } else if constexpr (kCount == 1) {
    values[0] += warp_shuffle_xor(values[0], kBit);
    return sum_over_lanes<kBit / 2, 1>(values, lane);
  } else {
    constexpr int kHalf = kCount / 2;
    const bool upper = (lane & kBit) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float given = upper ? values[i] : values[i + kHalf];
      values[i] = (upper ? values[i + kHalf] : values[i]) + warp_shuffle_xor(given, kBit);
    }
    return sum_over_lanes<kBit / 2, kHalf>(values, lane);
  }
}

// sums [kMlpUnits, kRows] of both parts of the inputs, for units of the first layer from `first` on.
template <int kRows, class T, int kPack>
__device__ __forceinline__ void multiply_units(const MlpShared<kRows>& shared, const MlpBlock<kRows>& block,
                                               int32_t first) {
  constexpr int kStep = kWarpSize * kPack, kChunk = kStep * kMlpPacks * kMlpParts, kFour = kPack < 4 ? 1 : 4;
  using Vector = Pack<T, kPack>;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int part = warp % kMlpParts, unit = warp / kMlpParts * kMlpWarpUnits;
  const MlpLayer& layer = block.p.layers[0];
  const int32_t inputs = block.p.inputs;
  const T* weight = static_cast<const T*>(layer.weight) + int64_t(first + unit) * inputs;
  float sums[kMlpWarpUnits * kRows] = {};
  for (int32_t begin = 0; begin < inputs; begin += kChunk) {
    Vector weights[kMlpWarpUnits][kMlpPacks];  // under way while the chunk of activations is made
#pragma unroll
    for (int u = 0; u < kMlpWarpUnits; ++u) {
#pragma unroll
      for (int i = 0; i < kMlpPacks; ++i) {
        const int32_t k = begin + (part * kMlpPacks + i) * kStep + lane * kPack;
        weights[u][i] = {};
        if (first + unit + u < layer.outputs && k < inputs) {
          weights[u][i] = *reinterpret_cast<const Vector*>(weight + int64_t(u) * inputs + k);
        }
      }
    }
    block_sync();  // everybody has read the chunk before this one
    load_features<kRows, kPack>(shared.x, block, begin, kChunk);
    block_sync();
#pragma unroll
    for (int i = 0; i < kMlpPacks; ++i) {
#pragma unroll
      for (int four = 0; four < kPack; four += kFour) {
        const float* x = shared.x + (part * kMlpPacks + i) * kStep + four * kWarpSize + lane * kFour;
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          const auto inputs_of_row = *reinterpret_cast<const Pack<float, kFour>*>(x + row * kMlpMaxChunk);
#pragma unroll
          for (int u = 0; u < kMlpWarpUnits; ++u) {
#pragma unroll
            for (int e = 0; e < kFour; ++e) {
              sums[u * kRows + row] += to_float(weights[u][i].element[four + e]) * inputs_of_row.element[e];
            }
          }
        }
      }
    }
  }
  constexpr int kLanes = kWarpSize / (kMlpWarpUnits * kRows);  // that have the same sum
  const float sum = sum_over_lanes<kWarpSize / 2, kMlpWarpUnits * kRows>(sums, lane);
  if (lane % kLanes == 0) shared.sums[(part * kMlpUnits + unit) * kRows + lane / kLanes] = sum;
}

// Whether the rows of a weight start at multiples of 16 bytes.
template <class T>
__device__ __forceinline__ bool in_packs(const void* weight, int32_t inputs) {
  return (reinterpret_cast<uintptr_t>(weight) | (size_t(inputs) * sizeof(T))) % 16 == 0;
}

template <class T>
struct WeightType {
  using Type = T;
};

// use(WeightType, whether in packs) with the type of a layer.
template <class Use>
__device__ __forceinline__ void with_type(const MlpLayer& layer, int32_t inputs, Use use) {
  if (layer.type == HeadType::kFloat32) {
    use(WeightType<float>(), in_packs<float>(layer.weight, inputs));
  } else if (layer.type == HeadType::kBFloat16) {
    use(WeightType<BFloat16>(), in_packs<BFloat16>(layer.weight, inputs));
  } else {
    use(WeightType<Float16>(), in_packs<Float16>(layer.weight, inputs));
  }
}

__device__ __forceinline__ float relu(float value) { return value < 0.0f ? 0.0f : value; }  // a NaN stays one

// The block's units of the first layer, in shared.hidden.
template <int kRows>
__device__ __forceinline__ void first_layer(const MlpShared<kRows>& shared, const MlpBlock<kRows>& block) {
  const MlpLayer& layer = block.p.layers[0];
  const int32_t own = block.split * block.launch.units, units = min(block.launch.units, layer.outputs - own);
  for (int32_t done = 0; done < units; done += kMlpUnits) {
    const int32_t first = own + done;
    with_type(layer, block.p.inputs, [&](auto type, bool packs) {
      using T = typename decltype(type)::Type;
      if (packs) {
        multiply_units<kRows, T, 16 / sizeof(T)>(shared, block, first);
      } else {
        multiply_units<kRows, T, 1>(shared, block, first);
      }
    });
    block_sync();
    for (int i = threadIdx.x; i < kMlpUnits * kRows; i += kMlpThreads) {
      const int32_t unit = first + i / kRows;
      if (unit >= layer.outputs) continue;
      const float value = shared.sums[i] + shared.sums[kMlpUnits * kRows + i] + layer.bias[unit];
      shared.hidden[done * kRows + i] = block.p.count > 1 ? relu(value) : value;
    }
  }
  block_sync();
}

// What the block's units add to the second layer's outputs: a thread to an output.
template <int kRows, class T, int kPack>
__device__ __forceinline__ void second_layer(const MlpShared<kRows>& shared, const MlpBlock<kRows>& block) {
  const MlpLayer& layer = block.p.layers[1];
  const int32_t inputs = block.p.layers[0].outputs, first = block.split * block.launch.units;
  const int32_t units = min(block.launch.units, inputs - first);
  constexpr int kFour = kRows < 4 ? kRows : 4;
  float* part = block.part(block.split);
  for (int32_t output = threadIdx.x; output < layer.outputs; output += kMlpThreads) {
    const T* weight = static_cast<const T*>(layer.weight) + int64_t(output) * inputs + first;
    float sums[kRows] = {};
#pragma unroll 2
    for (int32_t unit = 0; unit < units; unit += kPack) {
      const auto weights = *reinterpret_cast<const Pack<T, kPack>*>(weight + unit);
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
#pragma unroll
        for (int row = 0; row < kRows; row += kFour) {
          const auto hidden = *reinterpret_cast<const Pack<float, kFour>*>(shared.hidden + (unit + e) * kRows + row);
#pragma unroll
          for (int i = 0; i < kFour; ++i) sums[row + i] += to_float(weights.element[e]) * hidden.element[i];
        }
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) part[row * layer.outputs + output] = sums[row];
  }
}

// to = the sum of `count` parts that follow each other, with act(sum, output).
template <int kRows, class Act>
__device__ __forceinline__ void join_parts(float* to, const float* parts, const MlpBlock<kRows>& block, int32_t count,
                                           Act act) {
  const int32_t outputs = block.p.layers[1].outputs;
  const int64_t size = int64_t(kRows) * block.launch.wide;
  for (int32_t i = threadIdx.x; i < kRows * outputs; i += kMlpThreads) {
    float sum = parts[i];
#pragma unroll 8
    for (int32_t part = 1; part < count; ++part) sum += parts[part * size + i];
    to[i] = act(sum, i % outputs);
  }
}

// A layer of the rows of one block, from scratch to scratch: a warp to an output.
template <int kRows, class T>
__device__ __forceinline__ void later_layer(float* to, const float* x, const MlpLayer& layer, int32_t inputs,
                                            bool last) {
  const int lane = threadIdx.x % kWarpSize;
  for (int32_t item = threadIdx.x / kWarpSize; item < kRows * layer.outputs; item += kMlpWarps) {
    const int32_t row = item / layer.outputs, output = item % layer.outputs;
    const T* weight = static_cast<const T*>(layer.weight) + int64_t(output) * inputs;
    float sum = 0.0f;
#pragma unroll 8
    for (int32_t k = lane; k < inputs; k += kWarpSize) sum += to_float(weight[k]) * x[int64_t(row) * inputs + k];
#pragma unroll
    for (int bit = kWarpSize / 2; bit > 0; bit /= 2) sum += warp_shuffle_xor(sum, bit);
    sum += layer.bias[output];
    if (lane == 0) to[item] = last ? sum : relu(sum);
  }
}

// Joins what the blocks of these rows have left. Whether this block is the one that has the second layer's outputs.
template <int kRows>
__device__ __forceinline__ bool join(const BlockTeam& team, const MlpBlock<kRows>& block) {
  const MlpLaunch& launch = block.launch;
  const MlpLayer& layer = block.p.layers[1];
  const int32_t groups = mlp_groups(launch), group = block.split / launch.fan, first = group * launch.fan;
  const int32_t count = min(launch.fan, launch.splits - first);
  if (!arrives_last(team, block.counters() + group, count)) return false;
  join_parts(block.group(group), block.part(first), block, count, [](float sum, int32_t) { return sum; });
  if (!arrives_last(team, block.counters() + groups, groups)) return false;
  const bool last = block.p.count == 2;
  join_parts(block.layer(1), block.group(0), block, groups, [&](float sum, int32_t output) {
    sum += layer.bias[output];
    return last ? sum : relu(sum);
  });
  block_sync();
  return true;
}

template <int kRows>
__global__ void __launch_bounds__(kMlpThreads, 1) exit_mlp_kernel(MlpLaunch launch) {
  const MlpParams& p = launch.call;
  const MlpBlock<kRows> block(launch);
  const MlpShared<kRows> shared;
  const BlockTeam team = {int32_t(threadIdx.x), kMlpThreads};
  first_layer(shared, block);
  const float* results = shared.hidden;  // [kRows], where the model is a single layer
  if (p.count > 1) {
    with_type(p.layers[1], p.layers[0].outputs, [&](auto type, bool packs) {
      using T = typename decltype(type)::Type;
      if (packs) {
        second_layer<kRows, T, 16 / sizeof(T)>(shared, block);
      } else {
        second_layer<kRows, T, 1>(shared, block);
      }
    });
    if (!join(team, block)) return;
    for (int32_t at = 2; at < p.count; ++at) {
      with_type(p.layers[at], 0, [&](auto type, bool) {
        using T = typename decltype(type)::Type;
        const int32_t inputs = p.layers[at - 1].outputs;
        later_layer<kRows, T>(block.layer(at), block.layer(at - 1), p.layers[at], inputs, at + 1 == p.count);
      });
      block_sync();
    }
    results = block.layer(p.count - 1);
  }
  if (int32_t(threadIdx.x) < block.rows) {
    p.score[block.first_row + threadIdx.x] = 1.0f / (1.0f + expf(-results[threadIdx.x]));
  }
  if (!arrives_last(team, launch.counters, launch.row_blocks)) return;
  bool any = false;
  for (int32_t row = threadIdx.x; row < p.rows; row += kMlpThreads) any |= p.score[row] > p.threshold;
  any = TeamReducer(team, shared.slots).any(any);
  if (threadIdx.x == 0) *p.stop = !any;
}

// Instantiated in early_exit/cuda/instantiations.
template <int kRows>
cudaError_t launch_exit_mlp(const MlpLaunch& launch, int32_t blocks, int device, cudaStream_t stream) {
  return cuda::launch(exit_mlp_kernel<kRows>, dim3(unsigned(blocks)), dim3(kMlpThreads), MlpShared<kRows>::bytes(),
                      device, stream, launch);
}

}  // namespace specdec::cuda

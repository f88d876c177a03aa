// A weight times few rows on a GPU: norm, product, bias, activation and residual, in one launch.
//
// A block has 32 rows of the weight and up to 16 rows of x, or up to 64 (32 with quantised weights). With an activation
// 16 of its weight rows are of the gate and 16 those that they are multiplied with. It goes through the columns a tile
// at a time. Weights come as they lie, by asynchronous copies of 16 bytes, three or four tiles ahead; rows of x go
// through registers a tile ahead, where they are normalised and rounded to their dtype, as an engine feeds its matrix
// product. Two halves of the 32 rows and four parts of a tile's columns make the eight warps, and the four parts are
// summed one after the other at the end.
//
// Columns count in blocks of 32, those of GGUF files: four lanes share a block, and each has eight neighbouring columns
// of two weight rows and, the same ones, of every row of x. Weights in 16 bits are the first operand of the tensor
// cores' product, rows of x the second. Which column an instruction takes for which is free, as long as both operands
// agree: so a lane's eight columns are four of one instruction and four of the next, and both operands are read 16 bytes
// at a time. Quantised weights become 16-bit floats in registers, exactly: they are integers of at most 8 bits, and what
// a block of 32 has for a scale is multiplied with its sums. (A minimum m adds m times the sum of x, which is one more
// product, with ones.) Rows of float32 are multiplied by FMA, from the same tiles.
//
// Bytes: the weight once, which is the roof. Through the L2 cache besides: x once per block for the norm's statistics,
// while the first tiles are under way, and then once per block, rows / 32 times the weight's bytes. More rows than a
// block takes are further blocks, its neighbours, which read the weight from the L2 cache again. With 4,096 outputs
// there are 128 blocks with 24 to 32 KB under way in each.
//
// A layer of fewer outputs has its columns cut, so that there are up to 256 blocks: parts of at least four tiles, which
// is what a block has under way at once, so that cutting finer would make no more bytes come at a time. Each leaves its
// sums in scratch, and the last block to arrive sums them in the order of the columns. That is 2 KB for 16 rows, written
// once and read once, and 8 KB for 64, against 32 KB of weights or more.
//
// How a row's sums are made, the parts included, depends on the weight's shape and the types alone, not on how many rows
// there are, nor on which of the two sizes of a block they are in.
#pragma once

#include "common/cuda/last_block.cuh"
#include "linear/cuda/linear_launch.h"
#include "linear/cuda/row_tiles.cuh"

namespace specdec::cuda {

constexpr int kLinearThreads = 256;
constexpr int kLinearParts = 4;                                        // of a tile's columns
constexpr int kLinearThreadsOfRow = kLinearThreads / kLinearChannels;  // that copy a row of the weight

// T: of x. kQuantised: weights of 8 or 4 bits. kRows: rows of x in a block.
template <class T_, bool kQuantised_, int kRows_>
struct LinearShape {
  using T = T_;
  static constexpr bool kQuantised = kQuantised_;
  static constexpr int kThreads = kLinearThreads, kRows = kRows_, kParts = kLinearParts;
  static constexpr bool kMatrix = sizeof(T) == 2;
  static constexpr int kPiece = 16 / int(sizeof(T));  // elements of x that are loaded at once
  static constexpr int kColumns = linear_tile_columns(kQuantised);
  static constexpr int kBlocks32 = kColumns / kBlockElements / kLinearParts;  // blocks of 32 columns of a warp
  // Bytes from one row of a tile to the next, so that what eight lanes read lies in different banks.
  static constexpr int kPitch = kQuantised ? 288 : kColumns * int(sizeof(T)) + 64;
  static constexpr int kRowPitch = kColumns + 64 / int(sizeof(T));  // the same for x, in elements
  static constexpr int kTile = kLinearChannels * kPitch;
  static constexpr int kStages = kRows > 16 || kPitch > 512 ? 4 : 5;
  static constexpr int kPieces = kColumns / kPiece;                    // of a row of x
  static constexpr int kRowPieces = kRows * kPieces / kLinearThreads;  // of a thread
  static constexpr int kGroups = kMatrix ? kRows / 8 : kRows / 2;      // of a thread's sums, four in each
  static constexpr int kOutPitch = kRows + 1;
  static constexpr int kBlocksAtOnce = kRows > 16 || (kQuantised && !kMatrix) ? 1 : 2;  // on a multiprocessor, at least
};

// What a block works on.
struct LinearBlock {
  int32_t first_row, rows, first_output;
  int32_t first_tile, end_tile;  // of the columns
  int32_t split, place;          // which part of the columns; which of the results, in scratch and among the counters

  template <class Shape>
  __device__ __forceinline__ static LinearBlock of(const LinearLaunch& launch) {
    const LinearParams& p = launch.call;
    int32_t rest = int32_t(blockIdx.x);
    LinearBlock block;
    block.split = rest % launch.splits;
    block.place = rest / launch.splits;
    rest = block.place % launch.row_blocks;
    block.first_row = rest * Shape::kRows;
    block.rows = min(Shape::kRows, p.rows - block.first_row);
    block.first_output = block.place / launch.row_blocks * launch.block_outputs;
    const int32_t tiles = (p.dim + Shape::kColumns - 1) / Shape::kColumns;
    block.first_tile = int32_t(int64_t(tiles) * block.split / launch.splits);
    block.end_tile = int32_t(int64_t(tiles) * (block.split + 1) / launch.splits);
    return block;
  }

  // The row of the weight that one of the block's 32 is, or -1.
  __device__ __forceinline__ int64_t weight_row(const LinearParams& p, int channel) const {
    const bool halves = p.activation != Activation::kNone;
    const int32_t output = first_output + (halves ? channel % (kLinearChannels / 2) : channel);
    if (output >= p.outputs) return -1;
    return halves && channel >= kLinearChannels / 2 ? int64_t(p.outputs) + output : output;
  }
};

template <class Shape>
struct LinearShared {
  unsigned char* stages;  // [kStages, kLinearChannels, kPitch]
  typename Shape::T* y;   // [2, kRows, kRowPitch]
  float* out;             // [kLinearChannels, kOutPitch]
  float* inverse_norms;   // [kRows]

  __device__ LinearShared() {
    SharedMemory memory;
    stages = memory.take<unsigned char>(Shape::kStages * Shape::kTile);
    y = memory.take<typename Shape::T>(2 * Shape::kRows * Shape::kRowPitch);
    out = memory.take<float>(kLinearChannels * Shape::kOutPitch);
    inverse_norms = memory.take<float>(Shape::kRows);
  }
  static constexpr uint32_t bytes() {
    return SharedMemory::bytes<unsigned char>(Shape::kStages * Shape::kTile) +
           SharedMemory::bytes<typename Shape::T>(2 * Shape::kRows * Shape::kRowPitch) +
           SharedMemory::bytes<float>(kLinearChannels * Shape::kOutPitch) + SharedMemory::bytes<float>(Shape::kRows);
  }
};

// Copies tiles of the weight, eight threads to a row. What is not there becomes zeros.
template <class Shape>
struct LinearFetcher {
  const unsigned char* row;  // the thread's, from the next tile on
  int64_t left;              // bytes of it from there on; 0 where there is no such row
  int32_t tile_bytes, stage = 0;

  __device__ __forceinline__ LinearFetcher(const LinearLaunch& launch, const LinearBlock& block) {
    const int64_t at = block.weight_row(launch.call, int(threadIdx.x) / kLinearThreadsOfRow);
    tile_bytes = Shape::kColumns / kBlockElements * launch.block_bytes;
    const int64_t begin = int64_t(block.first_tile) * tile_bytes, end = int64_t(block.end_tile) * tile_bytes;
    row = static_cast<const unsigned char*>(launch.call.weight) + (at < 0 ? 0 : at * launch.row_bytes + begin);
    left = at < 0 ? 0 : min(end, launch.row_bytes) - begin;
  }

  // The next tile; behind the last one nothing.
  __device__ __forceinline__ void fetch(const LinearShared<Shape>& shared, const LinearLaunch& launch) {
    unsigned char* to = shared.stages + stage * Shape::kTile + int(threadIdx.x) / kLinearThreadsOfRow * Shape::kPitch;
    const int first = int(threadIdx.x) % kLinearThreadsOfRow;
    if (launch.unit == 16) {
#pragma unroll 4
      for (int at = first * 16; at < tile_bytes; at += kLinearThreadsOfRow * 16) {
        const bool there = at < left;
        cp_async_16(to + at, there ? row + at : static_cast<const unsigned char*>(launch.call.weight), there ? 16 : 0);
      }
    } else if (launch.unit == 4) {
#pragma unroll 4
      for (int at = first * 4; at < tile_bytes; at += kLinearThreadsOfRow * 4) {
        *reinterpret_cast<uint32_t*>(to + at) = at < left ? *reinterpret_cast<const uint32_t*>(row + at) : 0u;
      }
    } else {
#pragma unroll 4
      for (int at = first; at < tile_bytes; at += kLinearThreadsOfRow) to[at] = at < left ? row[at] : uint8_t(0);
    }
    cp_async_commit();
    if (left > 0) row += tile_bytes;
    left = left > tile_bytes ? left - tile_bytes : 0;
    stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
  }
};

// How a lane's eight weights of a block of 32 become numbers: (byte ^ flip) - zero, times the block's scale, plus its
// minimum. Bytes become floats as the last bits of 2^23.
struct Dequantiser {
  WeightType type;
  int32_t block_bytes, first;  // of the lane's eight bytes in a block
  uint32_t flip, mask;
  int32_t shift;
  float zero;

  __device__ __forceinline__ Dequantiser(const LinearLaunch& launch, int quarter) : type(launch.call.weight_type) {
    const bool fours = type == WeightType::kQ40 || type == WeightType::kQ41;
    block_bytes = launch.block_bytes;
    first = (type == WeightType::kInt8 ? 0 : type == WeightType::kQ41 ? 4 : 2) + (fours ? quarter % 2 : quarter) * 8;
    shift = fours ? quarter / 2 * 4 : 0;
    mask = fours ? 0x0f0f0f0fu : 0xffffffffu;
    flip = fours ? 0u : 0x80808080u;
    zero = 8388608.0f + (type == WeightType::kQ40 ? 8.0f : fours ? 0.0f : 128.0f);
  }

  __device__ __forceinline__ void load(float (&weights)[8], const unsigned char* block) const {
    const auto* halves = reinterpret_cast<const uint16_t*>(block + first);  // no more than these are aligned
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t four = uint32_t(halves[2 * i]) | uint32_t(halves[2 * i + 1]) << 16;
      four = (four >> shift & mask) ^ flip;
#pragma unroll
      for (int e = 0; e < 4; ++e) weights[4 * i + e] = float_of(0x4b000000u | (four >> 8 * e & 0xffu)) - zero;
    }
  }
  __device__ __forceinline__ float scale(const unsigned char* block) const {
    return type == WeightType::kInt8 ? 1.0f : float16_bits_to_float(*reinterpret_cast<const uint16_t*>(block));
  }
  __device__ __forceinline__ bool has_minimum() const { return type == WeightType::kQ41; }
  __device__ __forceinline__ static float minimum(const unsigned char* block) {
    return float16_bits_to_float(reinterpret_cast<const uint16_t*>(block)[1]);
  }
};

// A thread's sums: of a part of the columns, with two rows of the weight.
template <class Shape>
struct LinearSums {
  using T = typename Shape::T;
  float sum[Shape::kGroups][4] = {};

  // The results that sum[j][e] belongs to.
  __device__ __forceinline__ static int channel_of(int e) {
    const int lane = threadIdx.x % kWarpSize, half = threadIdx.x / kWarpSize % 2;
    return half * 16 + lane / 4 + e / 2 * 8;
  }
  __device__ __forceinline__ static int row_of(int j, int e) {
    return Shape::kMatrix ? j * 8 + int(threadIdx.x) % 4 * 2 + e % 2 : j * 2 + e % 2;
  }

  __device__ __forceinline__ void multiply(const unsigned char* stage, const T* y, const LinearLaunch& launch,
                                           const LinearBlock& block) {
    const int quarter = int(threadIdx.x) % 4, part = int(threadIdx.x) / kWarpSize / 2;
    const unsigned char* rows[2] = {stage + channel_of(0) * Shape::kPitch, stage + channel_of(2) * Shape::kPitch};
#pragma unroll
    for (int i = 0; i < Shape::kBlocks32; ++i) {
      const int at = part * Shape::kBlocks32 + i;
      const T* columns = y + at * kBlockElements + quarter * 8;
      const unsigned char* blocks[2] = {rows[0] + at * launch.block_bytes, rows[1] + at * launch.block_bytes};
      if constexpr (Shape::kMatrix) {
        multiply_matrix(blocks, columns, quarter, launch, block);
      } else {
        multiply_float32(blocks, columns, quarter, launch, block);
      }
    }
  }

  // 16 rows of the weight times all rows of x, over 32 columns. They are summed by themselves: a matrix instruction
  // cuts off what falls below the last bit of its greatest number, and long chains of them would show it.
  __device__ __forceinline__ void multiply_matrix(const unsigned char* const (&blocks)[2], const T* columns,
                                                  int quarter, const LinearLaunch& launch, const LinearBlock& block) {
    uint32_t a[2][4];  // of two instructions
    float scale[2] = {1.0f, 1.0f}, minimum[2] = {};
    bool has_minimum = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t pairs[4];
      if constexpr (Shape::kQuantised) {
        const Dequantiser of(launch, quarter);
        float weights[8];
        of.load(weights, blocks[r]);
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[i] = pack_pair<T>(weights[2 * i], weights[2 * i + 1]);
        scale[r] = of.scale(blocks[r]);
        has_minimum = of.has_minimum();
        if (has_minimum) minimum[r] = of.minimum(blocks[r]);
      } else {
        const auto words = *reinterpret_cast<const Bytes16*>(blocks[r] + quarter * 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[i] = words.word[i];
      }
#pragma unroll
      for (int step = 0; step < 2; ++step) a[step][r] = pairs[2 * step], a[step][2 + r] = pairs[2 * step + 1];
    }
    const uint32_t one = pack_pair<T>(1.0f, 1.0f), ones[4] = {one, one, one, one};
#pragma unroll
    for (int j = 0; j < Shape::kGroups; ++j) {
      if (j * 8 >= block.rows) continue;
      const auto b =
          *reinterpret_cast<const Bytes16*>(columns + (j * 8 + int(threadIdx.x) % kWarpSize / 4) * Shape::kRowPitch);
      float piece[4] = {};
      mma_m16n8k16<T>(piece, a[0], b.word[0], b.word[1]);
      mma_m16n8k16<T>(piece, a[1], b.word[2], b.word[3]);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[j][e] += scale[e / 2] * piece[e];
      if (has_minimum) {
        float of_x[4] = {};
        mma_m16n8k16<T>(of_x, ones, b.word[0], b.word[1]);
        mma_m16n8k16<T>(of_x, ones, b.word[2], b.word[3]);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[j][e] += minimum[e / 2] * of_x[e];
      }
    }
  }

  // The lane's eight columns of two rows of the weight times those of every row of x.
  __device__ __forceinline__ void multiply_float32(const unsigned char* const (&blocks)[2], const T* columns,
                                                   int quarter, const LinearLaunch& launch, const LinearBlock& block) {
    float weights[2][8], scale[2] = {1.0f, 1.0f}, minimum[2] = {};
    bool has_minimum = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if constexpr (Shape::kQuantised) {
        const Dequantiser of(launch, quarter);
        of.load(weights[r], blocks[r]);
        scale[r] = of.scale(blocks[r]);
        has_minimum = of.has_minimum();
        if (has_minimum) minimum[r] = of.minimum(blocks[r]);
      } else if (launch.call.weight_type == WeightType::kFloat32) {
        const auto eight = reinterpret_cast<const Pack<float, 4>*>(blocks[r] + quarter * 32);
#pragma unroll
        for (int e = 0; e < 8; ++e) weights[r][e] = eight[e / 4].element[e % 4];
      } else {
        const auto words = *reinterpret_cast<const Bytes16*>(blocks[r] + quarter * 16);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const uint32_t bits = words.word[e / 2] >> e % 2 * 16 & 0xffffu;
          weights[r][e] =
              launch.call.weight_type == WeightType::kBFloat16 ? float_of(bits << 16) : float16_bits_to_float(bits);
        }
      }
    }
#pragma unroll
    for (int row = 0; row < Shape::kRows; ++row) {
      if (row >= block.rows) continue;
      const auto eight = reinterpret_cast<const Pack<float, 4>*>(columns + row * Shape::kRowPitch);
      float piece[2] = {}, of_x = 0.0f;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float x = eight[e / 4].element[e % 4];
        piece[0] += weights[0][e] * x;
        piece[1] += weights[1][e] * x;
        if (Shape::kQuantised) of_x += x;
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float& to = sum[row / 2][r * 2 + row % 2];
        to += scale[r] * piece[r];
        if (has_minimum) to += minimum[r] * of_x;
      }
    }
  }

  // out = the sums of all parts, in their order. All threads of the block.
  __device__ __forceinline__ void join(const LinearShared<Shape>& shared) {
    if constexpr (!Shape::kMatrix) {
#pragma unroll
      for (int j = 0; j < Shape::kGroups; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sum[j][e] += warp_shuffle_xor(sum[j][e], 1);
          sum[j][e] += warp_shuffle_xor(sum[j][e], 2);
        }
      }
    }
    sum_parts<Shape>(shared.out, *this, Shape::kMatrix || threadIdx.x % 4 == 0);
  }
};

// Sums what the blocks have that share these results, in the order of their columns. Whether this block has the sums
// then, in shared memory: the last one to arrive. Rows that are padding are not written.
template <class Shape>
__device__ __forceinline__ bool join_splits(const LinearShared<Shape>& shared, const LinearLaunch& launch,
                                            const LinearBlock& block) {
  const int64_t size = int64_t(kLinearChannels) * Shape::kRows;  // of a block's sums
  float* const first = reinterpret_cast<float*>(launch.scratch) + int64_t(block.place) * launch.splits * size;
  const int channel = int(threadIdx.x) % kLinearChannels;
  constexpr int kRowStep = kLinearThreads / kLinearChannels;
  for (int row = int(threadIdx.x) / kLinearChannels; row < block.rows; row += kRowStep) {
    first[block.split * size + row * kLinearChannels + channel] = shared.out[channel * Shape::kOutPitch + row];
  }
  const BlockTeam team{int32_t(threadIdx.x), kLinearThreads};
  if (!arrives_last(team, launch.counters + block.place, launch.splits)) return false;
  for (int row = int(threadIdx.x) / kLinearChannels; row < block.rows; row += kRowStep) {
    const float* part = first + row * kLinearChannels + channel;
    float sum = *part;
#pragma unroll 4
    for (int32_t split = 1; split < launch.splits; ++split) sum += part[split * size];
    shared.out[channel * Shape::kOutPitch + row] = sum;
  }
  block_sync();
  return true;
}

// What stands in the way of a row's sum: the scale of an int8 row, and its bias.
template <class T>
__device__ __forceinline__ float finished(const LinearParams& p, float sum, int64_t weight_row) {
  if (p.weight_type == WeightType::kInt8) sum *= p.scales[weight_row];
  if (p.bias == nullptr) return sum;
  return sum + (p.bias_dtype == DType::kFloat32 ? static_cast<const float*>(p.bias)[weight_row]
                                                : to_float(static_cast<const T*>(p.bias)[weight_row]));
}

// SiLU, or GELU in its form with tanh: (1 + tanh z) / 2 = 1 / (1 + exp(-2 z)).
__device__ __forceinline__ float activated(Activation activation, float gate) {
  const float exponent =
      activation == Activation::kSwiglu ? gate : 1.5957691216f * (gate + 0.044715f * gate * gate * gate);
  return gate / (1.0f + expf(-exponent));
}

template <class Shape>
__device__ __forceinline__ void store_outputs(const LinearShared<Shape>& shared, const LinearLaunch& launch,
                                              const LinearBlock& block) {
  using T = typename Shape::T;
  const LinearParams& p = launch.call;
  const bool halves = p.activation != Activation::kNone;
  const int channels = halves ? kLinearChannels / 2 : kLinearChannels;
  const int channel = int(threadIdx.x) % channels;
  const int64_t output = block.first_output + channel;
  if (output >= p.outputs) return;
  for (int row = int(threadIdx.x) / channels; row < block.rows; row += kLinearThreads / channels) {
    const float* sums = shared.out + row;
    float value = finished<T>(p, sums[channel * Shape::kOutPitch], output);
    if (halves) {
      value = activated(p.activation, value) *
              finished<T>(p, sums[(channel + channels) * Shape::kOutPitch], p.outputs + output);
    }
    const int64_t at = block.first_row + row;
    if (p.residual != nullptr) {
      value += to_float(static_cast<const T*>(p.residual)[at * p.residual_stride_row + output]);
    }
    const T rounded = from_float<T>(value);
    static_cast<T*>(p.out)[at * p.out_stride_row + output] = rounded;
  }
}

template <class Shape>
__global__ void __launch_bounds__(kLinearThreads, Shape::kBlocksAtOnce) linear_kernel(LinearLaunch launch) {
  const LinearBlock block = LinearBlock::of<Shape>(launch);
  const LinearShared<Shape> shared;
  constexpr int kRowTile = Shape::kRows * Shape::kRowPitch;
  const LinearParams& p = launch.call;
  const auto* x = static_cast<const typename Shape::T*>(p.x) + block.first_row * p.x_stride_row;
  const BlockRows rows{x, p.x_stride_row, block.rows, p.dim, launch.x_aligned};
  const NormWeight norm{p.norm_weight, p.norm_dtype};
  LinearFetcher<Shape> weights(launch, block);
#pragma unroll 1
  for (int i = 0; i < Shape::kStages - 1; ++i) weights.fetch(shared, launch);
  RowTile<Shape> tile;
  tile.load(rows, norm, block.first_tile * Shape::kColumns);
  find_inverse_norms<Shape>(shared.inverse_norms, rows, p.norm_weight != nullptr, p.norm_eps);
  block_sync();
  LinearSums<Shape> sums;
  int32_t stage = 0, half = 0;  // of y
#pragma unroll 1
  for (int32_t at = block.first_tile; at < block.end_tile; ++at) {
    typename Shape::T* y = shared.y + half * kRowTile;  // that of the tile before is still multiplied
    tile.store(y, shared.inverse_norms, rows);
    cp_async_wait<Shape::kStages - 2>();
    block_sync();  // the tile and y are complete, and nobody is still at the tile before
    weights.fetch(shared, launch);
    if (at + 1 < block.end_tile) tile.load(rows, norm, (at + 1) * Shape::kColumns);
    sums.multiply(shared.stages + stage * Shape::kTile, y, launch, block);
    stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
    half ^= 1;
  }
  cp_async_wait<0>();
  sums.join(shared);
  if (launch.splits > 1 && !join_splits(shared, launch, block)) return;
  store_outputs(shared, launch, block);
}

template <class Shape>
cudaError_t launch_linear(LinearLaunch& linear, int device, cudaStream_t stream) {
  static_assert(LinearShared<Shape>::bytes() <= 98 * 1024, "what every device since 8.0 grants a block that asks");
  static_assert(Shape::kPitch % 16 == 0 && Shape::kRows * Shape::kPieces % kLinearThreads == 0);
  static_assert(Shape::kColumns == linear_tile_columns(Shape::kQuantised));
  const int64_t blocks = int64_t(linear.row_blocks) * linear_output_blocks(linear.call) * linear.splits;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return launch(linear_kernel<Shape>, dim3(unsigned(blocks)), dim3(kLinearThreads), LinearShared<Shape>::bytes(),
                device, stream, linear);
}

// Instantiated in linear/cuda/instantiations.
template <class T>
cudaError_t linear(LinearLaunch& linear, int device, cudaStream_t stream) {
  const bool quantised = is_quantised(linear.call);
  if constexpr (sizeof(T) == 4) {
    if (quantised) return launch_linear<LinearShape<T, true, kLinearFewRows>>(linear, device, stream);
    return launch_linear<LinearShape<T, false, kLinearFewRows>>(linear, device, stream);
  } else if (linear.row_block == kLinearFewRows) {
    if (quantised) return launch_linear<LinearShape<T, true, kLinearFewRows>>(linear, device, stream);
    return launch_linear<LinearShape<T, false, kLinearFewRows>>(linear, device, stream);
  } else {
    if (quantised) return launch_linear<LinearShape<T, true, kLinearQuantisedRows>>(linear, device, stream);
    return launch_linear<LinearShape<T, false, kLinearMoreRows>>(linear, device, stream);
  }
}

}  // namespace specdec::cuda

// exit_confidence and early_exit on a GPU: norm, head, softmax statistics, decision and compaction, in one launch.
//
// The grid is two blocks for each multiprocessor, or one for each tile of 128 head rows if there are fewer. Block b has
// tiles b, b + blocks, ...: for all of its hidden rows (up to 64; 32 where the head is int8 or float32, 16 where it is
// int8 and hidden rows are float32) it streams them through shared memory (exit_tiles.cuh) without a pause between
// tiles: while the logits of one become sums and lists, the next one is on its way. Logits are handed from the warps
// that made them to the warp that has the row, for 8 or 16 hidden rows at a time, and never reach global memory.
//
// Each block leaves a state per hidden row in scratch. The last block to arrive merges them, in the order of the
// blocks, so a result depends on the number of multiprocessors, but neither on the order of blocks nor on the other
// rows. More hidden rows than fit are served by blocks of their own, next to each other in the grid, so that they find
// the head in the L2 cache; the last block of all decides who exits.
//
// A launch may have some of the rows only, which a list on the device names: those that a screen gave up, or those that
// are still open between two parts of a head (bounded_exit.cuh). Without any its blocks end at once.
//
// Bytes: the head once; from the L2 cache the hidden rows once per tile, which for 16 bits is rows / 128 of the head;
// rows * blocks * (16 + 8 * max(2, top_k)) of scratch, written once and read about twice.
#pragma once

#include "common/cuda/last_block.cuh"
#include "early_exit/cuda/exit_part.cuh"
#include "early_exit/cuda/exit_rows.cuh"

namespace specdec::cuda {

// The block's dynamic shared memory.
template <class Shape>
struct ExitShared {
  // Hidden rows whose logits are handed over at once. Where registers are shortest, only 8 go without spills.
  static constexpr int kPass = Shape::kRows == 8 || (Shape::kRows == 64 && !kNormsLast<Shape>) ? 8 : 16;
  static constexpr int kPitch = Shape::kVocab + 4;  // different banks for what a warp writes

  unsigned char* stages;  // [kStages, kStageBytes]
  float* logits;          // [kPass, kPitch]
  RowFactors factors;
  RowState* states;  // [kRows]
  uint64_t* keys;    // [kRows, top_k]
  uint32_t* slots;

  __device__ explicit ExitShared(int32_t top_k) {
    SharedMemory memory;
    stages = memory.take<unsigned char>(Shape::kStages * Shape::kStageBytes);
    logits = memory.take<float>(kPass * kPitch);
    factors.staged = memory.take<float>(Shape::kRows);
    factors.logit = memory.take<float>(Shape::kRows);
    states = memory.take<RowState>(Shape::kRows);
    keys = memory.take<uint64_t>(Shape::kRows * top_k);
    slots = memory.take<uint32_t>(TeamReducer::kWords);
  }
  static constexpr size_t bytes(int32_t top_k) {
    return SharedMemory::bytes<unsigned char>(Shape::kStages * Shape::kStageBytes) +
           SharedMemory::bytes<float>(kPass * kPitch) + 2 * SharedMemory::bytes<float>(Shape::kRows) +
           SharedMemory::bytes<RowState>(Shape::kRows) + SharedMemory::bytes<uint64_t>(Shape::kRows * top_k) +
           SharedMemory::bytes<uint32_t>(TeamReducer::kWords);
  }
};

// Streams tiles `first`, first + stride, ... of the head past the hidden rows. absorb(tile, sums) gets
// each tile's sums and may use barriers; behind its last one it may read shared memory, and write no more than its own.
template <class Shape, class Stager, class Absorb>
__device__ __forceinline__ void stream_head(const HeadRows& head, Stager& stager, unsigned char* stages, int32_t first,
                                            int32_t stride, Absorb absorb) {
  const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
  const int32_t tiles = (head.count + Shape::kVocab - 1) / Shape::kVocab;
  int32_t next_tile = first, next_dim = 0;  // of the piece that is fetched next
  int filling = 0;
  // Brings the next piece on its way; between the loads and the stores of a thread's rows, other(turn, stage) is done
  // with the stage that is filled after this one, and so is the oldest.
  const auto fetch = [&](auto other) {
    unsigned char* to = stages + filling * Shape::kStageBytes;
    filling = filling + 1 == Shape::kStages ? 0 : filling + 1;
    const bool exists = next_tile < tiles;
    if (exists) load_head<Shape>(to, head, next_tile, next_dim);
    cp_async_commit();
#pragma unroll
    for (int turn = 0; turn < Stager::kPerThread; ++turn) {
      if (exists) stager.load(turn, next_dim);
      other(turn, stages + filling * Shape::kStageBytes);
      if (exists) stager.store(turn, next_dim, to, next_tile == first);
    }
    next_dim += Shape::kDims;
    if (next_dim >= head.dim) {
      next_dim = 0;
      next_tile += stride;
    }
  };
#pragma unroll 1
  for (int i = 0; i < Shape::kStages - 1; ++i) fetch([](int, const unsigned char*) {});
#pragma unroll 1
  for (int32_t tile = first; tile < tiles; tile += stride) {
    float sums[Shape::kRows / 8][4] = {};
#pragma unroll 1
    for (int32_t dim = 0; dim < head.dim; dim += Shape::kDims) {
      cp_async_wait<Shape::kStages - 2>();
      block_sync();  // the piece has landed, and everyone has left the one before it, whose stage is filled next
      fetch([&](int turn, const unsigned char* stage) {
        multiply_piece<Shape, Stager::kPerThread>(turn, sums, stage, warp, lane);
      });
    }
    if (tile == first) stager.finish_norm();
    absorb(tile, sums);
  }
  cp_async_wait<0>();
}

// Hands sums over to the warps that have the rows, kPass rows at a time: take(n, z) gets the products of row n, z[i] of
// the tile's place lane + 32 * i.
template <class Shape, class Take>
__device__ __forceinline__ void hand_over(const ExitShared<Shape>& shared, const float (&sums)[Shape::kRows / 8][4],
                                          int32_t rows, Take take) {
  using Shared = ExitShared<Shape>;
  const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
#pragma unroll
  for (int first = 0; first < Shape::kRows; first += Shared::kPass) {
    if (first > 0) block_sync();  // everyone has read the rows before
#pragma unroll
    for (int j = 0; j < Shared::kPass / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        shared.logits[(j * 8 + sum_row<Shape>(e, lane)) * Shared::kPitch + warp * 16 + sum_entry<Shape>(e, lane)] =
            sums[first / 8 + j][e];
      }
    }
    block_sync();
#pragma unroll 1
    for (int n = warp; n < Shared::kPass && first + n < rows; n += Shape::kThreads / kWarpSize) {
      float z[Shape::kVocab / kWarpSize];
#pragma unroll
      for (int i = 0; i < Shape::kVocab / kWarpSize; ++i) {
        z[i] = shared.logits[n * Shared::kPitch + lane + kWarpSize * i] * shared.factors.logit[first + n];
      }
      take(first + n, z);
    }
  }
}

// What makes logits of a tile's products, in a lane: scales of int8 heads, and the bias.
template <class Shape>
struct TileTerms {
  static constexpr int kCount = Shape::kVocab / kWarpSize;
  float scale[kCount], bias[kCount];

  __device__ __forceinline__ TileTerms(const float* scales, const float* biases, int32_t vocab, int32_t first) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int32_t entry = first + kWarpSize * i;
      scale[i] = Shape::kIsInt8 && entry < vocab ? scales[entry] : 1.0f;
      bias[i] = entry >= vocab ? negative_infinity() : biases != nullptr ? biases[entry] : 0.0f;
    }
  }
  __device__ __forceinline__ void apply(float (&z)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) z[i] = z[i] * scale[i] + bias[i];
  }
};

// A block's share, in shared memory: registers are short while the head goes by.
struct OwnPlace {
  int32_t block;      // among those that share the vocabulary
  int32_t row_block;  // of hidden rows
  int32_t rows;       // how many it has
};

template <class Shape>
__device__ __forceinline__ void see_head(const ExitLaunch& launch, const ExitShared<Shape>& shared,
                                         const HiddenRows& rows, const OwnPlace& own_place) {
  const ExitParams& p = launch.call;
  const int lane = int(threadIdx.x) % kWarpSize;
  const int32_t top_k = top_k_of(p);
  for (int n = int(threadIdx.x); n < Shape::kRows; n += Shape::kThreads) shared.states[n] = empty_state();
  for (int i = int(threadIdx.x); i < Shape::kRows * top_k; i += Shape::kThreads) shared.keys[i] = 0;
  find_factors<Shape>(rows, shared.factors);
  block_sync();
  const HeadRows head = {p.head, nullptr, p.vocab, p.dim, launch.head_aligned};
  RowStager<Shape> stager(rows, shared.factors);
  stream_head<Shape>(head, stager, shared.stages, own_place.block, launch.blocks, [&](int32_t tile, const auto& sums) {
    const int32_t first = tile * Shape::kVocab + lane;
    const TileTerms<Shape> terms(p.scales, p.bias, p.vocab, first);
    hand_over<Shape>(shared, sums, own_place.rows, [&](int n, float (&z)[TileTerms<Shape>::kCount]) {
      terms.apply(z);
      RowState state = shared.states[n];
      uint64_t own = lane < top_k ? shared.keys[n * top_k + lane] : 0;
      list_keys(own, z, [&](int i) { return first + kWarpSize * i; }, top_k, lane);
      absorb(state, z, kLog2E / temperature_of(p, rows.row(n)));
      warp_sync();  // all lanes have read the state
      if (lane == 0) shared.states[n] = state;
      if (lane < top_k) shared.keys[n * top_k + lane] = own;
    });
  });
}

// Where two blocks of the most rows don't fit a multiprocessor's shared memory, registers are not short either.
constexpr int kBlocksOfMostRows = kLargeSharedMemory ? 2 : 1;

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kRows < 64 ? 2 : kBlocksOfMostRows)
    exit_confidence_kernel(ExitLaunch launch) {
  const ExitParams& p = launch.call;
  const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
  const int32_t first_row = int32_t(blockIdx.x) % launch.row_blocks * Shape::kRows, top_k = top_k_of(p);
  const auto all_rows = [&] { return launch.row_list != nullptr ? launch.row_list[p.rows] : p.rows; };
  if (first_row >= all_rows()) {
    if (blockIdx.x == 0 && threadIdx.x == 0 && launch.part.open != nullptr) launch.part.open[p.rows] = 0;
    return;
  }
  SPECDEC_SHARED(int32_t, ids, [Shape::kRows]);
  SPECDEC_SHARED(OwnPlace, own_place, );
  const HiddenRows rows = {p, ids, min(Shape::kRows, all_rows() - first_row), launch.hidden_aligned,
                           launch.norm_aligned};
  if (threadIdx.x == 0) own_place = {int32_t(blockIdx.x) / launch.row_blocks, first_row / Shape::kRows, rows.count};
  if (int(threadIdx.x) < rows.count) {
    const int32_t row = first_row + int(threadIdx.x);
    ids[threadIdx.x] = launch.row_list != nullptr ? launch.row_list[row] : row;
  }
  block_sync();
  const ExitShared<Shape> shared(top_k);
  see_head<Shape>(launch, shared, rows, own_place);
  block_sync();

  const int32_t carried = launch.part.seen != nullptr ? 1 : 0;  // slots of what the parts before have left
  const StoredStates stored(launch.scratch, launch.scratch + launch.keys, launch.slots, top_k);
  for (int n = warp; n < rows.count; n += Shape::kThreads / kWarpSize) {
    const uint64_t own = lane < top_k ? shared.keys[n * top_k + lane] : 0;
    stored.leave(rows.row(n), carried + own_place.block, shared.states[n], key_further_on(own, launch.part.begin),
                 lane);
  }
  TeamReducer reduce({int32_t(threadIdx.x), Shape::kThreads}, shared.slots);
  if (!arrives_last(reduce.team, launch.counters + own_place.row_block, launch.blocks)) return;
  for (int n = warp; n < rows.count; n += Shape::kThreads / kWarpSize) {
    const int32_t row = rows.row(n);
    uint64_t own;
    const RowState state = stored.merged(row, carried + launch.blocks, kLog2E / temperature_of(p, row), own, lane);
    write_stats(p, row, state, own, launch.rechecked != nullptr ? kExitFellBack : 0, lane);
    if (launch.rechecked != nullptr && lane == 0) launch.rechecked[row] = p.vocab;
    if (launch.part.seen == nullptr) continue;
    if (lane == 0) launch.part.seen[row] = launch.part.begin + p.vocab;
    warp_sync();  // all lanes have read what is carried
    stored.leave(row, 0, state, own, lane);
  }
  if (p.measure == ExitMeasure::kNone) return;
  const int32_t row_blocks = (all_rows() + Shape::kRows - 1) / Shape::kRows;
  if (!arrives_last(reduce.team, launch.counters + launch.row_blocks, row_blocks)) return;
  if (launch.part.reach != nullptr && list_open_rows(reduce, launch, stored, all_rows()) > 0) return;
  decide(reduce, p);
}

// What every device since 8.0 grants to a block that asks, and CUDA's own part of it.
constexpr size_t kExitSharedBytes = 99 * 1024 - 1024;

template <class Shape>
cudaError_t launch_exit_confidence(const ExitLaunch& arguments, int device, cudaStream_t stream) {
  static_assert(ExitShared<Shape>::bytes(kMaxTopK) <= kExitSharedBytes, "every device can run it");
  ExitLaunch launch = arguments;
  launch.row_blocks = (launch.call.rows + Shape::kRows - 1) / Shape::kRows;
  const int64_t blocks = int64_t(launch.row_blocks) * launch.blocks;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return cuda::launch(exit_confidence_kernel<Shape>, dim3(unsigned(blocks)), dim3(Shape::kThreads),
                      ExitShared<Shape>::bytes(top_k_of(launch.call)), device, stream, launch);
}

constexpr int max_of_all(int a) { return a; }
template <class... Rest>
constexpr int max_of_all(int a, Rest... rest) {
  return a > max_of_all(rest...) ? a : max_of_all(rest...);
}

// Hidden rows of a block: the fewest that take all, as far as a head has them.
template <class Element, class T, int kParts, int... kRows>
cudaError_t pick_rows(const ExitLaunch& launch, int device, cudaStream_t stream) {
  constexpr int kMax = max_of_all(kRows...);
  cudaError_t result = cudaErrorInvalidValue;
  bool done = false;
  const auto offer = [&](auto rows) {
    if (done || (launch.call.rows > rows() && rows() < kMax)) return;
    done = true;
    result = launch_exit_confidence<HeadShape<Element, T, rows(), kParts>>(launch, device, stream);
  };
  (offer(std::integral_constant<int, kRows>()), ...);
  return result;
}

// Heads of one type, and of int8 ones with hidden rows in kParts parts. Instantiated in early_exit/cuda/instantiations.
template <class Element, int kParts>
cudaError_t exit_confidence_of(const ExitLaunch& launch, int device, cudaStream_t stream) {
  if constexpr (std::is_same_v<Element, float>) {
    return pick_rows<float, float, 1, 8, 32>(launch, device, stream);
  } else if constexpr (!std::is_same_v<Element, int8_t>) {
    return pick_rows<Element, Element, 1, 8, 16, 32, 64>(launch, device, stream);
  } else if constexpr (kParts == 2) {
    return pick_rows<int8_t, Float16, 2, 8, 16>(launch, device, stream);
  } else {
    return pick_rows<int8_t, Float16, 1, 8, 16, 32>(launch, device, stream);
  }
}

}  // namespace specdec::cuda

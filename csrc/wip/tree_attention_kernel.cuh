// tree_attention's kernel and launch: the pipeline over the slots, and the join of the parts. See tree_attention.cuh.
#pragma once

#include "specdec/tree_attention.cuh"

namespace specdec {

// The pipeline. Afterwards the warps with the first half of the slots hold the sums of their rows.
template <class T, class Shape>
__device__ __forceinline__ void attend(WarpRows<Shape>& sums, const TreeAttentionLaunch& launch,
                                       const BlockWork& work) {
  const TreeAttentionParams& p = launch.call;
  SharedMemory shared;
  T* q_tile = shared.take<T>(Shape::kRows * Shape::kPitch);
  T* stages = shared.take<T>(Shape::kStages * 2 * Shape::kTile);
  SlotPlace* places = shared.take<SlotPlace>(2 * Shape::kSlots);
  uint32_t* seen = shared.take<uint32_t>(2 * p.words + 2);

  const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int row_warp = warp % Shape::kRowWarps, slot_warp = warp / Shape::kRowWarps;
  LaneRow rows[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    rows[i] = lane_row<Shape>(launch, work, row_warp * 16 + lane / 4 + 8 * i);
    sums.maximum[i] = negative_infinity();
  }
  load_queries<T, Shape>(q_tile, launch, work);  // part of the first group
  if (p.ancestors != nullptr && work.end > work.context) join_ancestors(seen, p, work);
  block_sync();

  int32_t fetched = next_tile<Shape>(seen, p, work, work.begin);  // the next tile to look up
#pragma unroll
  for (int stage = 0; stage < Shape::kStages - 1; ++stage) {
    SlotPlace* stage_places = places + stage % 2 * Shape::kSlots;
    for (int i = thread; i < Shape::kSlots; i += Shape::kThreads)
      stage_places[i] = slot_place(seen, p, work, fetched + i);
    block_sync();
    if (fetched < work.end) {
      load_tile<T, Shape>(stages + stage * 2 * Shape::kTile, stages + (stage * 2 + 1) * Shape::kTile, stage_places, p,
                          work);
      fetched = next_tile<Shape>(seen, p, work, fetched + Shape::kSlots);
    }
    cp_async_commit();
  }
  SlotPlace ahead = {-1, 0};
  static_assert(Shape::kSlots <= Shape::kThreads, "a thread looks up one slot");
  if (thread < Shape::kSlots) ahead = slot_place(seen, p, work, fetched + thread);

  int stage = 0, turn = (Shape::kStages - 1) % 2;
  for (int32_t tile = next_tile<Shape>(seen, p, work, work.begin); tile < work.end;
       tile = next_tile<Shape>(seen, p, work, tile + Shape::kSlots)) {
    SlotPlace* tile_places = places + turn * Shape::kSlots;
    if (thread < Shape::kSlots) tile_places[thread] = ahead;
    cp_async_wait<Shape::kStages - 2>();
    block_sync();  // the tile has landed, and everyone has left the one before it, whose stage is filled next

    if (fetched < work.end) {
      const int free = stage == 0 ? Shape::kStages - 1 : stage - 1;
      load_tile<T, Shape>(stages + free * 2 * Shape::kTile, stages + (free * 2 + 1) * Shape::kTile, tile_places, p,
                          work);
      fetched = next_tile<Shape>(seen, p, work, fetched + Shape::kSlots);
      if (thread < Shape::kSlots) ahead = slot_place(seen, p, work, fetched + thread);
    }
    cp_async_commit();

    const int first = slot_warp * Shape::kWarpSlots;
    const T* k = stages + stage * 2 * Shape::kTile + first * Shape::kPitch;
    float scores[Shape::kWarpSlots / 8][4] = {};
    score_tile<T, Shape>(scores, q_tile + row_warp * 16 * Shape::kPitch, k, lane);
    adjust_scores<Shape>(scores, p, work, rows, tile + first, lane);
    soften<Shape>(sums, scores);
    add_values<T, Shape>(sums, scores, k + Shape::kTile, lane);
    stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
    turn ^= 1;
  }
  cp_async_wait<0>();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sums.total[i] += warp_shuffle_xor(sums.total[i], 1);
    sums.total[i] += warp_shuffle_xor(sums.total[i], 2);
  }
  if constexpr (Shape::kSlotWarps == 2) {
    block_sync();  // everyone has left the stages
    float* half = reinterpret_cast<float*>(stages) + row_warp * 16 * (Shape::kDim + 2);
    static_assert(Shape::kRows * (Shape::kDim + 2) * 4 <= Shape::kStages * 2 * Shape::kTile * 2, "a half fits");
    if (slot_warp == 1) leave_half<Shape>(sums, half, half + 16 * Shape::kDim, lane);
    block_sync();
    if (slot_warp == 0) join_half<Shape>(sums, half, half + 16 * Shape::kDim, lane);
  }
}

// What a row's sums become: the factor of its output, and its log-sum-exp.
struct RowResult {
  float factor, lse;
};
__device__ __forceinline__ RowResult finish_row(const TreeAttentionParams& p, int32_t head, bool real, float maximum,
                                                float total) {
  if (!real) return {0.0f, negative_infinity()};
  float factor = 1.0f;
  if (p.sinks != nullptr) {
    const float sink = p.sinks[head] * kLog2E;
    const float joined = fmaxf(maximum, sink);
    const float base = joined == negative_infinity() ? 0.0f : joined;
    factor = fast_exp2(maximum - base);
    total = total * factor + fast_exp2(sink - base);
    maximum = joined;
  }
  if (!(total > 0.0f)) return {0.0f, negative_infinity()};
  return {factor * p.out_scale / total, (maximum + log2f(total)) * kLn2};
}

// Where a packed row's result goes.
template <class T>
struct RowTarget {
  T* out;
  float* lse;
  int32_t head;
  bool exists, real;
};
template <class T>
__device__ __forceinline__ RowTarget<T> row_target(const TreeAttentionLaunch& launch, const BlockWork& work, int row) {
  const TreeAttentionParams& p = launch.call;
  const int32_t packed = work.first_row + row, tree_row = packed / launch.group;
  RowTarget<T> target;
  target.head = work.kv_head * launch.group + packed % launch.group;
  target.exists = tree_row < work.own_rows;
  target.real = target.exists && tree_row >= work.real_begin && tree_row < work.real_end;
  const int64_t q_row = int64_t(work.first_q) + tree_row;
  target.out = static_cast<T*>(p.out) + work.request * p.out_stride_batch + q_row * p.out_stride_row +
               target.head * p.out_stride_head;
  const int64_t lse_row = (p.offsets == nullptr ? int64_t(work.request) * p.queries : 0) + q_row;
  target.lse = p.lse == nullptr ? nullptr : p.lse + lse_row * p.heads + target.head;
  return target;
}

template <class T, class Shape>
__device__ __forceinline__ void write_result(const WarpRows<Shape>& sums, const TreeAttentionLaunch& launch,
                                             const BlockWork& work, int row_warp, int lane) {
  const TreeAttentionParams& p = launch.call;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const RowTarget<T> target = row_target<T>(launch, work, row_warp * 16 + lane / 4 + 8 * i);
    if (!target.exists) continue;
    const RowResult result = finish_row(p, target.head, target.real, sums.maximum[i], sums.total[i]);
    if (target.lse != nullptr && lane % 4 == 0) *target.lse = result.lse;
#pragma unroll
    for (int j = 0; j < Shape::kDim / 8; ++j) {
      const int column = j * 8 + lane % 4 * 2;
      if (column >= p.dim) continue;
      const bool some = result.factor != 0.0f;
      Pack<T, 2> pair = {{from_float<T>(some ? sums.out[j][2 * i] * result.factor : 0.0f),
                          from_float<T>(some ? sums.out[j][2 * i + 1] * result.factor : 0.0f)}};
      *reinterpret_cast<Pack<T, 2>*>(target.out + column) = pair;
    }
  }
}

// A part's sums: [kRows, kDim] and [kRows, 2] in scratch.
template <class Shape>
__device__ __forceinline__ float* part_scratch(const TreeAttentionLaunch& launch, int32_t block) {
  return launch.call.scratch + int64_t(block) * Shape::kRows * (Shape::kDim + 2);
}

// The last block joins the parts, in the order of the slots: a warp for a row, its lanes for the columns.
template <class T, class Shape>
__device__ __forceinline__ void join_parts(const TreeAttentionLaunch& launch, const BlockWork& work) {
  const TreeAttentionParams& p = launch.call;
  const int lane = threadIdx.x % kWarpSize;
  const int32_t first_block = int32_t(blockIdx.x) - work.part;
  for (int row = threadIdx.x / kWarpSize; row < Shape::kRows; row += Shape::kThreads / kWarpSize) {
    const RowTarget<T> target = row_target<T>(launch, work, row);
    if (!target.exists) continue;
    float maximum = negative_infinity(), total = 0.0f;
    for (int32_t part = 0; part < work.parts; ++part) {
      maximum = fmaxf(maximum, part_scratch<Shape>(launch, first_block + part)[Shape::kRows * Shape::kDim + row * 2]);
    }
    const float base = maximum == negative_infinity() ? 0.0f : maximum;
    constexpr int kPairs = (Shape::kDim / 2 + kWarpSize - 1) / kWarpSize;
    float sum[kPairs][2] = {};
    for (int32_t part = 0; part < work.parts; ++part) {
      const float* from = part_scratch<Shape>(launch, first_block + part);
      const float* stats = from + Shape::kRows * Shape::kDim + row * 2;
      const float weight = fast_exp2(stats[0] - base);
      total += stats[1] * weight;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const int column = (i * kWarpSize + lane) * 2;
        if (column >= p.dim) continue;
        const Pack<float, 2> pair = *reinterpret_cast<const Pack<float, 2>*>(from + row * Shape::kDim + column);
        sum[i][0] += pair.element[0] * weight;
        sum[i][1] += pair.element[1] * weight;
      }
    }
    const RowResult result = finish_row(p, target.head, target.real, maximum, total);
    if (target.lse != nullptr && lane == 0) *target.lse = result.lse;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int column = (i * kWarpSize + lane) * 2;
      if (column >= p.dim) continue;
      const bool some = result.factor != 0.0f;
      Pack<T, 2> pair = {{from_float<T>(some ? sum[i][0] * result.factor : 0.0f),
                          from_float<T>(some ? sum[i][1] * result.factor : 0.0f)}};
      *reinterpret_cast<Pack<T, 2>*>(target.out + column) = pair;
    }
  }
}

// Rows of a packed q that no block has: before the first request, after the last one, and a request's rows from
// max_queries on. Of each kv head the request's first block blanks them.
template <class T>
__device__ __forceinline__ void blank_rows(const TreeAttentionLaunch& launch, const BlockWork& work) {
  const TreeAttentionParams& p = launch.call;
  if (p.offsets == nullptr || work.first_row != 0 || work.part != 0) return;
  const int32_t pieces = work.request == 0 ? 2 : 1;
  for (int32_t piece = 0; piece < pieces; ++piece) {
    const bool before = piece == 1;
    const int32_t begin = before ? 0 : work.first_q + work.own_rows;
    int32_t end = before ? work.first_q : at_most(at_least(p.offsets[work.request + 1], begin), p.queries);
    if (!before && work.request == p.batch - 1) end = p.queries;
    for (int32_t i = threadIdx.x; i < (end - begin) * launch.group; i += blockDim.x) {
      const int64_t row = begin + i / launch.group;
      const int32_t head = work.kv_head * launch.group + i % launch.group;
      T* out = static_cast<T*>(p.out) + row * p.out_stride_row + head * p.out_stride_head;
      for (int32_t column = 0; column < p.dim; ++column) out[column] = from_float<T>(0.0f);
      if (p.lse != nullptr) p.lse[row * p.heads + head] = negative_infinity();
    }
  }
}

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) tree_attention_kernel(TreeAttentionLaunch launch) {
  const BlockWork work = block_work<Shape>(launch);
  SPECDEC_SHARED(int32_t, arrived, );
  if (work.part < work.parts) {
    const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
    blank_rows<T>(launch, work);
    WarpRows<Shape> sums;
    attend<T, Shape>(sums, launch, work);
    const bool owner = warp < Shape::kRowWarps;
    if (work.parts == 1) {
      if (owner) write_result<T, Shape>(sums, launch, work, warp, lane);
    } else {
      if (owner) {
        float* to = part_scratch<Shape>(launch, int32_t(blockIdx.x));
        leave_half<Shape>(sums, to + warp * 16 * Shape::kDim, to + Shape::kRows * Shape::kDim + warp * 32, lane);
      }
      device_fence();
      block_sync();
      int32_t* counter = launch.call.counters + int32_t(blockIdx.x) / launch.max_parts;
      if (thread == 0) arrived = atomic_add(counter, 1);
      block_sync();
      if (arrived == work.parts - 1) {
        device_fence();
        join_parts<T, Shape>(launch, work);
        if (thread == 0) atomic_add(counter, -work.parts);
      }
    }
  }
}

// What a call needs of the caller: float32 numbers of scratch, and int32 counters that are zero before the first call.
struct TreeAttentionScratch {
  int64_t floats, counters;
};

inline TreeAttentionLaunch tree_attention_launch(const TreeAttentionParams& call, int rows) {
  TreeAttentionLaunch launch = {call, call.heads / call.kv_heads, call.queries, 0, 1};
  if (call.offsets != nullptr && call.ancestors != nullptr && call.nodes < call.queries)
    launch.max_queries = call.nodes;
  launch.row_blocks = int32_t((int64_t(launch.max_queries) * launch.group + rows - 1) / rows);
  // A function of the call's shape: as many as a request that fills the cache has. At least one row block, so that
  // padding is written.
  if (launch.row_blocks == 0) launch.row_blocks = 1;
  const int64_t longest = (int64_t(call.slots) + kSlotsPerPart - 1) / kSlotsPerPart;
  int64_t parts = call.num_splits > 0 ? call.num_splits : longest;
  if (parts > kMostParts) parts = kMostParts;
  launch.max_parts = parts < 1 ? 1 : int32_t(parts);
  return launch;
}

// Packed rows of a block: the fewest of 16, 32, 64, 128 that take all, as far as a dimension has them.
inline int tree_attention_rows(const TreeAttentionParams& call, int compiled_dim) {
  const TreeAttentionLaunch launch = tree_attention_launch(call, 16);
  const int64_t rows = int64_t(launch.max_queries) * launch.group;
  const int most = compiled_dim > 128 ? 32 : 128;
  int block_rows = 16;
  while (block_rows < most && block_rows < rows) block_rows *= 2;
  return block_rows;
}

template <class T, class Shape>
cudaError_t launch_tree_attention(const TreeAttentionParams& call, int device, cudaStream_t stream) {
  const TreeAttentionLaunch launched = tree_attention_launch(call, Shape::kRows);
  const int64_t blocks = int64_t(call.batch) * call.kv_heads * launched.row_blocks * launched.max_parts;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const size_t bytes =
      SharedMemory::bytes<T>(Shape::kRows * Shape::kPitch) + SharedMemory::bytes<T>(Shape::kStages * 2 * Shape::kTile) +
      SharedMemory::bytes<SlotPlace>(2 * Shape::kSlots) + SharedMemory::bytes<uint32_t>(2 * call.words + 2);
  return launch(tree_attention_kernel<T, Shape>, dim3(unsigned(blocks)), dim3(Shape::kThreads), bytes, device, stream,
                launched);
}

// One dtype and compiled dimension. Instantiated in csrc/cuda/tree_attention_DTYPE_DIM.cu.
template <class T, int kDim>
cudaError_t tree_attention(const TreeAttentionParams& call, int device, cudaStream_t stream) {
  const int rows = tree_attention_rows(call, kDim);
  if constexpr (kDim <= 128) {
    if (rows == 128) return launch_tree_attention<T, TileShape<kDim, 128>>(call, device, stream);
  }
  if constexpr (kDim <= 128) {
    if (rows == 64) return launch_tree_attention<T, TileShape<kDim, 64>>(call, device, stream);
  }
  if (rows == 32) return launch_tree_attention<T, TileShape<kDim, 32>>(call, device, stream);
  return launch_tree_attention<T, TileShape<kDim, 16>>(call, device, stream);
}

}  // namespace specdec

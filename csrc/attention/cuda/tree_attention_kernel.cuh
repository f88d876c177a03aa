// tree_attention's kernel and launch: the pipeline over the slots, and what becomes of the sums. See
// tree_attention.cuh.
#pragma once

#include "attention/cuda/tree_attention_copies.cuh"
#include "attention/cuda/tree_attention_join.cuh"

namespace specdec::cuda {

// The block's dynamic shared memory.
template <class Shape>
struct SharedTiles {
  typename Shape::T* q;           // [kRows, kPitch]
  typename Shape::Cache* stages;  // [kStages, K and V, kSlots, kCachePitch]
  SlotPlace* places;              // [2, kSlots], of the tile that is copied next and of the one before it
  SeenNodes seen;

  __device__ explicit SharedTiles(int32_t words) {
    SharedMemory memory;
    q = memory.take<typename Shape::T>(Shape::kRows * Shape::kPitch);
    stages = memory.take<typename Shape::Cache>(Shape::kStages * 2 * Shape::kTile);
    places = memory.take<SlotPlace>(2 * Shape::kSlots);
    seen = {memory.take<int32_t>(2 * words), 2 * words};
  }
  static constexpr size_t bytes(int32_t words) {
    return SharedMemory::bytes<typename Shape::T>(Shape::kRows * Shape::kPitch) +
           SharedMemory::bytes<typename Shape::Cache>(Shape::kStages * 2 * Shape::kTile) +
           SharedMemory::bytes<SlotPlace>(2 * Shape::kSlots) + SharedMemory::bytes<int32_t>(2 * words);
  }
};

// The pipeline. All threads copy, the first kWorkers warps multiply.
template <class Shape>
__device__ __forceinline__ void attend(WarpRows<Shape>& sums, const SharedTiles<Shape>& shared,
                                       const TreeAttentionLaunch& launch, const BlockWork& work) {
  const TreeAttentionParams& p = launch.call;
  const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int row_warp = warp % Shape::kRowWarps, column_warp = warp / Shape::kRowWarps;
  const bool works = warp < Shape::kWorkers;
  LaneRow rows[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    rows[i] = lane_row(launch, work, row_warp * 16 + lane / 4 + 8 * i);
    sums.maximum[i] = negative_infinity();
  }
  load_queries<Shape>(shared.q, launch, work);  // part of the first group
  if (p.ancestors != nullptr && work.end > work.context) join_ancestors(shared.seen, p, work);
  block_sync();

  static_assert(Shape::kSlots <= Shape::kThreads, "a thread looks up one slot");
  int32_t fetched = next_tile<Shape>(shared.seen, work, work.begin);  // the next tile to copy
  SlotPlace ahead = {-1, -1};                                         // of this thread's slot of that tile
  if (thread < Shape::kSlots) ahead = slot_place(shared.seen, p, work, fetched + thread);
  int filling = 0, turn = 0;
  // Before tile t is multiplied, tile t + kStages - 1 is on its way, and the page of tile t + kStages is being read.
  const auto fetch = [&] {
    if (fetched < work.end) {
      load_tile<Shape>(shared.stages + filling * 2 * Shape::kTile, shared.places + turn * Shape::kSlots, p, work);
      fetched = next_tile<Shape>(shared.seen, work, fetched + Shape::kSlots);
      if (thread < Shape::kSlots) ahead = slot_place(shared.seen, p, work, fetched + thread);
    }
    cp_async_commit();
    filling = filling + 1 == Shape::kStages ? 0 : filling + 1;
    turn ^= 1;
  };
#pragma unroll 1
  for (int i = 0; i < Shape::kStages - 1; ++i) {
    if (thread < Shape::kSlots) shared.places[turn * Shape::kSlots + thread] = ahead;
    block_sync();
    fetch();
  }

  int stage = 0;
#pragma unroll 1
  for (int32_t tile = next_tile<Shape>(shared.seen, work, work.begin); tile < work.end;
       tile = next_tile<Shape>(shared.seen, work, tile + Shape::kSlots)) {
    if (thread < Shape::kSlots) shared.places[turn * Shape::kSlots + thread] = ahead;
    cp_async_wait<Shape::kStages - 2>();
    block_sync();  // the tile has landed, and everyone has left the one before it, whose stage is filled next
    fetch();
    if (works) {
      const typename Shape::Cache* k = shared.stages + stage * 2 * Shape::kTile;
      float scores[Shape::kSlots / 8][4] = {};
      score_tile<Shape>(scores, shared.q + row_warp * 16 * Shape::kPitch, k, lane);
      const bool masked = is_masked<Shape>(work, tile);
      const uint32_t seen = adjust_scores<Shape>(scores, p, work, rows, tile, masked, lane);
      online_softmax<Shape>(sums, scores);
      const typename Shape::Cache* v = k + Shape::kTile + column_warp * Shape::kColumns;
      if (masked) {
        add_values<Shape, true>(sums, scores, v, seen, lane);
      } else {
        add_values<Shape, false>(sums, scores, v, seen, lane);
      }
    }
    stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
  }
  cp_async_wait<0>();
  finish_sums<Shape>(sums);
  block_sync();  // everyone has left q, where results are gathered
}

// The result of a block that has all slots. A warp gathers its rows in q's place, to write them in pieces of 16 bytes.
template <class Shape>
__device__ __forceinline__ void write_result(const WarpRows<Shape>& sums, typename Shape::T* gathered,
                                             const TreeAttentionLaunch& launch, const BlockWork& work, int warp,
                                             int lane) {
  using T = typename Shape::T;
  const TreeAttentionParams& p = launch.call;
  const int first_row = warp % Shape::kRowWarps * 16, first_column = warp / Shape::kRowWarps * Shape::kColumns;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first_row + lane / 4 + 8 * i;
    const RowTarget<T> target = row_target<T>(launch, work, row);
    const RowResult result = finish_row(p, target, sums.maximum[i], sums.total[i]);
    if (first_column == 0 && lane % 4 == 0 && target.lse != nullptr) *target.lse = result.lse;
#pragma unroll
    for (int j = 0; j < Shape::kColumns / 8; ++j) {
      *reinterpret_cast<Pack<T, 2>*>(gathered + row * Shape::kPitch + first_column + column_of<Shape>(j, lane)) = {
          {from_float<T>(scaled(sums.out[j][2 * i], result)), from_float<T>(scaled(sums.out[j][2 * i + 1], result))}};
    }
  }
  warp_sync();
  constexpr int kChunks = Shape::kColumns / 8;
#pragma unroll 1
  for (int i = lane; i < 16 * kChunks; i += kWarpSize) {
    const int row = first_row + i / kChunks, column = first_column + i % kChunks * 8;
    const RowTarget<T> target = row_target<T>(launch, work, row);
    if (!target.exists || column >= p.dim) continue;
    *reinterpret_cast<Pack<T, 8>*>(target.out + column) =
        *reinterpret_cast<const Pack<T, 8>*>(gathered + row * Shape::kPitch + column);
  }
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kMinBlocks)
    tree_attention_kernel(TreeAttentionLaunch launch) {
  const BlockWork work = block_work<Shape>(launch);
  SPECDEC_SHARED(int32_t, arrived, );
  if (work.split < work.splits) {
    const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
    blank_rows<typename Shape::T>(launch, work);
    const SharedTiles<Shape> shared(launch.call.words);
    WarpRows<Shape> sums;
    attend<Shape>(sums, shared, launch, work);
    const bool works = warp < Shape::kWorkers;
    if (work.splits == 1) {
      if (works) write_result<Shape>(sums, shared.q, launch, work, warp, lane);
    } else {
      if (works) leave_split<Shape>(sums, launch, work, warp, lane);
      device_fence();
      block_sync();
      int32_t* counter = launch.call.counters + int32_t(blockIdx.x) / launch.max_splits;
      if (thread == 0) arrived = atomic_add(counter, 1);
      block_sync();
      if (arrived == work.splits - 1) {
        device_fence();
        join_splits<Shape>(launch, work);
        if (thread == 0) atomic_add(counter, -work.splits);
      }
    }
  }
}

constexpr int64_t kScratchBytes = 256 << 20;

inline TreeAttentionLaunch tree_attention_launch(const TreeAttentionParams& call, int rows, int compiled_dim) {
  TreeAttentionLaunch launch = {call, call.heads / call.kv_heads, call.queries, 0, 1, 0, call.batch};
  if (call.offsets != nullptr && call.ancestors != nullptr) launch.max_queries = at_most(call.queries, call.nodes);
  // At least one row block, so that padding is written.
  launch.row_blocks = int32_t((int64_t(launch.max_queries) * launch.group + rows - 1) / rows);
  launch.row_blocks = at_least(launch.row_blocks, 1);
  // As many splits as a request has that fills the cache and asks with one row.
  launch.max_splits = splits_of(call.slots, call.kv_heads, call.num_splits, 1);
  const int64_t blocks = int64_t(call.kv_heads) * launch.row_blocks * launch.max_splits;  // of a request
  int64_t most = 0x7fffffff / blocks;
  if (launch.max_splits > 1) most = kScratchBytes / (blocks * rows * (compiled_dim + 2) * int64_t(sizeof(float)));
  if (most < launch.requests) launch.requests = most < 1 ? 1 : int32_t(most);
  return launch;
}

// Packed rows of a block: the fewest of 16, 32, 64, 128 that take all, as far as a device has room for them.
inline int tree_attention_rows(const TreeAttentionParams& call, int compiled_dim, int most) {
  const int64_t rows =
      int64_t(tree_attention_launch(call, 16, compiled_dim).max_queries) * (call.heads / call.kv_heads);
  int block_rows = 16;
  while (block_rows < most && block_rows < rows) block_rows *= 2;
  return block_rows;
}

// What every device since 8.0 grants to a block that asks, what those for data centers do (8.0, 9.0, 10.0), and CUDA's
// own split and `arrived` of it.
constexpr size_t kSharedBytesPerBlock = 99 * 1024, kSharedBytesOfLarge = 163 * 1024, kSharedBytesOfCuda = 1024 + 128;
constexpr size_t kSharedBytesOfHopper = 228 * 1024;  // of all blocks of a multiprocessor, also of 10.0

// The most rows of a block. Dims above 192 have 128 on large devices only.
inline bool has_room_for_128(int compiled_dim, int device) {
  return compiled_dim <= 192 || shared_bytes_per_block(device) >= kSharedBytesOfLarge;
}

template <class Shape>
cudaError_t launch_tree_attention(const TreeAttentionParams& call, int device, cudaStream_t stream) {
  constexpr bool kLarge = Shape::kDim > 192 && Shape::kRows > 64;
  static_assert(SharedTiles<Shape>::bytes(1024 / 64) <=
                    (kLarge ? kSharedBytesOfLarge : kSharedBytesPerBlock) - kSharedBytesOfCuda,
                "1,024 nodes fit");
  static_assert(Shape::kMinBlocks * (SharedTiles<Shape>::bytes(256 / 64) + kSharedBytesOfCuda) <= kSharedBytesOfHopper,
                "so many blocks share a multiprocessor");
  TreeAttentionLaunch slice = tree_attention_launch(call, Shape::kRows, Shape::kDim);
  cudaError_t error = cudaSuccess;
  for (; slice.first_request < call.batch && error == cudaSuccess; slice.first_request += slice.requests) {
    const int64_t requests = at_most(slice.requests, call.batch - slice.first_request);
    const int64_t blocks = requests * call.kv_heads * slice.row_blocks * slice.max_splits;
    if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
    error = launch(tree_attention_kernel<Shape>, dim3(unsigned(blocks)), dim3(Shape::kThreads),
                   SharedTiles<Shape>::bytes(call.words), device, stream, slice);
  }
  return error;
}

// One dtype, cache and compiled dimension. Instantiated in attention/cuda/instantiations.
template <class T, class Cache, int kDim>
cudaError_t tree_attention(const TreeAttentionParams& call, int device, cudaStream_t stream) {
  const int rows = tree_attention_rows(call, kDim, has_room_for_128(kDim, device) ? 128 : 64);
  if (rows == 128) return launch_tree_attention<TileShape<T, Cache, kDim, 128>>(call, device, stream);
  if (rows == 64) return launch_tree_attention<TileShape<T, Cache, kDim, 64>>(call, device, stream);
  if (rows == 32) return launch_tree_attention<TileShape<T, Cache, kDim, 32>>(call, device, stream);
  return launch_tree_attention<TileShape<T, Cache, kDim, 16>>(call, device, stream);
}

}  // namespace specdec::cuda

// tree_attention's way from global to shared memory: where a slot lies, and the copies of a tile and of the queries.
#pragma once

#include "attention/cuda/tree_attention.cuh"

namespace specdec::cuda {

// Where a slot's K and V start, in elements from the KV head's first one. A slot that must not be read has k -1.
struct alignas(16) SlotPlace {
  int64_t k, v;
};

__device__ __forceinline__ SlotPlace slot_place(const SeenNodes& seen, const TreeAttentionParams& p,
                                                const BlockWork& work, int32_t slot) {
  bool readable = slot >= work.lowest && slot < work.end;
  if (readable && slot >= work.context) readable = (seen.from(slot - work.context) & 1) != 0;
  if (!readable) return {-1, -1};
  int32_t page = work.request, row = slot;
  if (p.page_table != nullptr) {
    page = p.page_table[work.request * p.page_table_stride + slot / p.page_size];
    row = slot % p.page_size;
    if (page < 0 || page >= p.pages) return {-1, -1};
  }
  return {page * p.k_stride_batch + row * p.k_stride_slot, page * p.v_stride_batch + row * p.v_stride_slot};
}

// Starts the copies of one tile of K and the one of V behind it. Unread slots and columns beyond dim become zeros.
template <class Shape>
__device__ __forceinline__ void load_tile(typename Shape::Cache* k_tile, const SlotPlace* places,
                                          const TreeAttentionParams& p, const BlockWork& work) {
  using Cache = typename Shape::Cache;
  constexpr int kElements = 16 / int(sizeof(Cache)), kChunks = Shape::kDim / kElements;
  const Cache* k = static_cast<const Cache*>(p.k_cache) + work.kv_head * p.k_stride_head;
  const Cache* v = static_cast<const Cache*>(p.v_cache) + work.kv_head * p.v_stride_head;
#pragma unroll 4
  for (int i = threadIdx.x; i < Shape::kSlots * kChunks; i += Shape::kThreads) {
    const int slot = i / kChunks, column = i % kChunks * kElements;
    const SlotPlace place = places[slot];
    const bool readable = place.k >= 0 && column < p.dim;
    Cache* to = k_tile + slot * Shape::kCachePitch + column;
    cp_async_16(to, k + (readable ? place.k + column : 0), readable ? 16 : 0);
    cp_async_16(to + Shape::kTile, v + (readable ? place.v + column : 0), readable ? 16 : 0);
  }
}

// Queries for 16-bit keys are copied as they are, asynchronously; for fp8 keys with their dims in the order of theirs.
template <class Shape>
__device__ __forceinline__ void load_queries(typename Shape::T* q_tile, const TreeAttentionLaunch& launch,
                                             const BlockWork& work) {
  using T = typename Shape::T;
  constexpr int kChunks = Shape::kDim / 8;
  const TreeAttentionParams& p = launch.call;
  const T* q = static_cast<const T*>(p.q) + work.request * p.q_stride_batch + work.first_q * p.q_stride_row;
  for (int i = threadIdx.x; i < Shape::kRows * kChunks; i += Shape::kThreads) {
    const int row = i / kChunks, column = i % kChunks * 8;
    const int32_t packed = work.first_row + row, tree_row = packed / launch.group;
    const int32_t head = work.kv_head * launch.group + packed % launch.group;
    const bool real = tree_row >= work.real_begin && tree_row < work.real_end && column < p.dim;
    const T* from = q + (real ? tree_row * p.q_stride_row + head * p.q_stride_head + column : 0);
    T* to = q_tile + row * Shape::kPitch;
    if constexpr (Shape::kFloat8) {
      Pack<T, 8> piece = {};
      if (real) piece = *reinterpret_cast<const Pack<T, 8>*>(from);
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const int place = column / 16 * 16 + float8_place(column % 16 / 2 + pair) * 2;
        *reinterpret_cast<Pack<T, 2>*>(to + place) = {{piece.element[2 * pair], piece.element[2 * pair + 1]}};
      }
    } else {
      cp_async_16(to + column, from, real ? 16 : 0);
    }
  }
}

}  // namespace specdec::cuda

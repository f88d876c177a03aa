// Plain structs of the KV ops, shared by the CPU kernel, the CUDA launcher and the bindings. See common/types.h.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace specdec {

// How a cache keeps numbers: as they come, or in 8 bits.
enum class CacheCode : int32_t { kPlain, kFloat8E4m3, kFloat8E5m2, kInt8 };

// Rows of K, V and Q. A row is (request, query) if they are padded, else a token; kv/append_row.h finds its place.
struct KvAppendParams {
  const void* k;                // [batch, queries, kv_heads, k_dim], or packed [tokens, kv_heads, k_dim]
  const void* v;                // the same with v_dim
  const void* q;                // the same with heads and k_dim, or nullptr
  const int32_t* depths;        // [topology_batch, nodes], or nullptr: every node exists, its depth is its number
  const int32_t* num_nodes;     // [topology_batch]
  const int32_t* offsets;       // [batch + 1] of packed rows, or nullptr
  const int32_t* context_lens;  // [batch] or nullptr: then slots are given, and positions if rows are rotated
  const int32_t* query_starts;  // [batch] or nullptr
  const int32_t* requests;      // [rows] of packed rows without offsets, or nullptr: all are of request 0
  const int32_t* slots;         // [rows] or nullptr: context_lens + node
  const int32_t* positions;     // [rows] or nullptr: context_lens + depth
  const int32_t* page_table;    // [batch, max_pages], contiguous, or nullptr: dense
  const float* cosines;         // [table_positions, pairs], contiguous, or nullptr: no rotation
  const float* sines;           // like cosines
  const void* q_norm_weight;    // [k_dim], or nullptr: no norm
  const void* k_norm_weight;    // the same
  const float* k_scales;        // [kv_heads], or nullptr: k_scale
  const float* v_scales;        // [kv_heads], or nullptr: v_scale
  void* k_cache;                // [batch, slots, kv_heads, k_dim], or [pages, page_size, kv_heads, k_dim]
  void* v_cache;                // the same with v_dim
  void* q_out;                  // like q, and may be q
  // The batch's are 0 where rows are packed. The first of a cache is of a request, or of a page.
  int64_t k_stride_batch, k_stride_row, k_stride_head;
  int64_t v_stride_batch, v_stride_row, v_stride_head;
  int64_t q_stride_batch, q_stride_row, q_stride_head;
  int64_t out_stride_batch, out_stride_row, out_stride_head;
  int64_t k_cache_stride_batch, k_cache_stride_slot, k_cache_stride_head;
  int64_t v_cache_stride_batch, v_cache_stride_slot, v_cache_stride_head;
  int64_t rows, slots_each, page_size;  // slots of a request: max_pages * page_size where the cache is paged
  int64_t table_positions;
  DType dtype, q_norm_dtype, k_norm_dtype;  // of k, v, q and q_out; of the norms' weights
  CacheCode code;
  float norm_eps, k_scale, v_scale;
  int32_t packed, batch, queries, heads, kv_heads, k_dim, v_dim, pairs, interleaved;
  int32_t query_start, topology_batch, nodes, pages;
};

// Strides count elements. The first is of a request of a dense cache, of a page of a paged one.
struct KvLayer {
  const void* norm_weight;  // [dim], or nullptr: no norm
  const void* k_weight;     // [kv_heads * head_dim, dim], contiguous
  const void* v_weight;
  void* k_cache;  // [batch, slots, kv_heads, head_dim], or [pages, page_size, kv_heads, head_dim]
  void* v_cache;
  int64_t k_stride_batch, k_stride_slot, k_stride_head;
  int64_t v_stride_batch, v_stride_slot, v_stride_head;
  DType norm_dtype;
};

constexpr int32_t kMaxKvLayers = 32;  // of a launch, whose parameters may have 4 KB

struct KvPropagateParams {
  const void* hidden;         // [rows, dim]
  const float* cosines;       // [rows, pairs], contiguous, or nullptr: no rotation
  const float* sines;         // like cosines
  const int32_t* requests;    // [rows] or nullptr: all rows are of request 0
  const int32_t* slots;       // [rows]
  const int32_t* page_table;  // [batch, max_pages], contiguous, or nullptr: dense
  KvLayer layers[kMaxKvLayers];
  int64_t hidden_stride_row;
  int64_t slots_each, page_size;  // of a request: max_pages * page_size where the cache is paged
  DType dtype;                    // of hidden, the weights and the caches
  int32_t count, rows, dim, kv_heads, head_dim, pairs, interleaved;
  int32_t batch, pages;  // requests, and pages of a paged cache
  float norm_eps;
};

// A layer's K and V as bytes, for ops that move rows: sizes and strides count bytes. `first` is the first dimension, of
// requests in a dense cache and of pages in a paged one, and a page of a dense cache is all of a request's slots.
struct KvCacheLayer {
  void* k_cache;
  void* v_cache;
  const int32_t* page_table;  // [batch, max_pages], contiguous
  int64_t k_stride_first, k_stride_slot, k_stride_head;
  int64_t v_stride_first, v_stride_slot, v_stride_head;
  int32_t k_bytes, v_bytes;  // of a head in a slot
  int32_t first, page_size, kv_heads;
  int32_t max_pages;  // of a request; -1: dense, without a page table
};

// First page copies[i, 1] = page copies[i, 0], then slot context_lens[b] + i = slot context_lens[b] + nodes[b, i].
struct KvCommitParams {
  const int32_t* nodes;         // [batch, steps], contiguous
  const int32_t* context_lens;  // [batch]
  const int32_t* copies;        // [copy_count, 2], contiguous, or nullptr
  KvCacheLayer layers[kMaxKvLayers];
  int32_t count, batch, steps, copy_count;
};

// out[row, layer] = K and V of a slot, one kv head after the other.
struct GatherLayerKvParams {
  const int32_t* slots;     // [rows]
  const int32_t* requests;  // [rows] or nullptr: all rows are of request 0
  void* out;                // [rows, layers, kv_heads * (k_bytes + v_bytes)], contiguous but for its rows
  KvCacheLayer layers[kMaxKvLayers];
  int64_t out_stride_row;  // in bytes
  int32_t count, rows, batch;
};

}  // namespace specdec

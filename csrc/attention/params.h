// Plain structs of tree_attention and merge_states, shared by the CPU kernels, the CUDA launchers and the bindings. See
// common/types.h.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace specdec {

// One attention call. A query row of request b is node query_start + query_starts[b] + r of its tree; node i has its
// K and V in slot context_lens[b] + i. Without a tree (ancestors == nullptr) a row sees exactly the context.
struct TreeAttentionParams {
  const void* q;        // [batch, queries, heads, dim], or [tokens, heads, dim] when offsets is set
  const void* k_cache;  // [batch, slots, kv_heads, dim], or [pages, page_size, kv_heads, dim] when page_table is set
  const void* v_cache;
  void* out;                    // like q
  float* lse;                   // [batch, queries, heads] or [tokens, heads], contiguous; nullptr: not wanted
  const uint64_t* ancestors;    // [batch or 1, nodes, words], contiguous; nullptr: no tree
  const int32_t* depths;        // [batch or 1, nodes]
  const int32_t* num_nodes;     // [batch or 1]
  const int32_t* offsets;       // [batch + 1], first row of each request in a packed q; nullptr: padded
  const int32_t* context_lens;  // [batch]
  const int32_t* page_table;    // [batch, max_pages]; nullptr: dense
  const int32_t* query_starts;  // [batch] or nullptr
  const float* sinks;           // [heads] or nullptr
  const float* alibi_slopes;    // [heads] or nullptr

  int64_t q_stride_batch, q_stride_row, q_stride_head;  // packed: q_stride_batch is 0
  int64_t out_stride_batch, out_stride_row, out_stride_head;
  int64_t k_stride_batch, k_stride_slot, k_stride_head;  // paged: k_stride_batch is the stride of a page
  int64_t v_stride_batch, v_stride_slot, v_stride_head;
  int64_t page_table_stride;

  DType dtype;                                   // of q, out and the caches
  int32_t float8_cache;                          // 1: the caches are e4m3 instead (CUDA only)
  int32_t batch, queries, heads, kv_heads, dim;  // packed: queries is the number of rows of q in all
  int32_t slots;                                 // dense: slots per request; paged: max_pages * page_size
  int32_t pages, page_size;                      // paged only
  int32_t nodes, words, topology_batch;          // topology_batch is batch, or 1 to broadcast
  int32_t query_start;
  int32_t window;  // 0: none. Otherwise a row sees positions p with 0 <= its own position - p < window
  float scale;
  float softcap;           // 0: none. Otherwise s becomes softcap * tanh(s / softcap)
  float out_scale;         // multiplies the output (the scale of a quantised V cache; else 1)
  int32_t num_splits;      // 0: the default, a function of the request alone
  int32_t path_invariant;  // 1: a row's bits depend on its path alone (CPU only; num_splits is 0)

  // CUDA only, of the sizes that tree_attention_scratch names. The scratch belongs to one call until it has run, the
  // counters to one stream at a time.
  float* scratch;     // may hold anything
  int32_t* counters;  // zero before the first call; every call leaves zeros
};

// Merges two partial attentions over disjoint slots: rows = batch * queries * heads, everything contiguous.
struct MergeStatesParams {
  const void* out_a;   // [rows, dim]
  const float* lse_a;  // [rows]
  const void* out_b;
  const float* lse_b;
  void* out;
  float* lse;
  int64_t rows;
  int32_t dim;
  DType dtype;
};

}  // namespace specdec

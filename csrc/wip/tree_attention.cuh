// Tree attention: every query row attends to its request's context and to its own ancestors among the draft nodes.
//
// What a block does. A block owns one (request, KV head), kRows packed query rows of it, and one part of its slots.
// Rows are the tree's rows times the query heads of the KV head's group, token-major, so that one matrix instruction
// serves all heads of a group and K and V are read once per KV head and row block. A warp owns 16 rows (two warps share
// them, each with half of a tile's slots, where there are few). Tiles of slots arrive by asynchronous copies, kStages
// deep; where a slot lies (its page) is looked up one tile further ahead, by one thread per slot.
//
// Two phases. Tiles inside the context have no mask and load none. In the tail, from the last tile of the context on, a
// lane takes 64 bits of its two rows' ancestor sets into registers and shifts. The block first joins the sets of all
// its rows in shared memory: a tail tile that none of them sees is left out, and a slot that none of them sees is not
// read, so whatever an unused slot holds, NaN included, can't reach a result.
//
// Split over the slots. The number of parts is worked out by every block from the request's context length alone; the
// grid has room for as many as the cache's capacity allows, and blocks without a part end at once. Parts leave their
// unnormalised sums in scratch memory, and the last block to arrive joins them in the order of the slots, so the result
// does not depend on who was last. It also sets the counter back to zero. A request with one part writes its result
// directly.
//
// Bytes: K and V once per KV head and row block, q and out once, 8 per row, 64 nodes and tail tile, 4 per slot for
// paged caches (once per KV head and row block), and with S parts 2 * S * (dim + 2) * 4 per row of scratch.
//
// Packing rows of a group is what XQA does, the split is Flash-Decoding's, the softmax FlashAttention-2's.
#pragma once

#include "specdec/tree_attention_tiles.cuh"

namespace specdec {

constexpr int32_t kSlotsPerPart = 512;
constexpr int32_t kMostParts = 32;

// A launch: the call and what the host derives from it.
struct TreeAttentionLaunch {
  TreeAttentionParams call;
  int32_t group, max_queries, row_blocks, max_parts;
};

// What a block works on. The same in all of its threads.
struct BlockWork {
  int32_t request, kv_head, first_row, part, parts;
  int32_t first_q, own_rows;  // of the request, in q
  int32_t first_node, count;
  int32_t context;
  int32_t begin, end;            // slots of this part
  int32_t lowest;                // slots before it are outside of every row's window
  int32_t real_begin, real_end;  // tree rows of this block that are real
  const uint64_t* ancestors;     // of the request
  const int32_t* depths;
};

__device__ __forceinline__ int32_t at_least(int32_t a, int32_t b) { return a > b ? a : b; }
__device__ __forceinline__ int32_t at_most(int32_t a, int32_t b) { return a < b ? a : b; }

template <class Shape>
__device__ __forceinline__ BlockWork block_work(const TreeAttentionLaunch& launch) {
  const TreeAttentionParams& p = launch.call;
  BlockWork work;
  int32_t rest = int32_t(blockIdx.x);
  work.part = rest % launch.max_parts;
  rest /= launch.max_parts;
  const int32_t row_block = rest % launch.row_blocks;
  rest /= launch.row_blocks;
  work.kv_head = rest % p.kv_heads;
  work.request = rest / p.kv_heads;
  work.first_row = row_block * Shape::kRows;

  work.first_q = 0;
  work.own_rows = p.queries;
  if (p.offsets != nullptr) {
    work.first_q = at_most(at_least(p.offsets[work.request], 0), p.queries);
    const int32_t end = at_most(at_least(p.offsets[work.request + 1], work.first_q), p.queries);
    work.own_rows = at_most(end - work.first_q, launch.max_queries);
  }
  work.first_node = p.query_start + (p.query_starts == nullptr ? 0 : p.query_starts[work.request]);
  const int32_t tree = p.topology_batch > 1 ? work.request : 0;
  work.count = 0;
  if (p.ancestors != nullptr) {
    work.count = at_most(at_least(p.num_nodes[tree], 0), p.nodes);
    work.ancestors = p.ancestors + int64_t(tree) * p.nodes * p.words;
    work.depths = p.depths + int64_t(tree) * p.nodes;
  }
  work.context = at_most(at_least(p.context_lens[work.request], 0), p.slots);

  // Real rows: those of this block whose node exists.
  work.real_begin = work.first_row / launch.group;
  work.real_end = at_most((work.first_row + Shape::kRows - 1) / launch.group + 1, work.own_rows);
  if (p.ancestors != nullptr) {
    work.real_begin = at_least(work.real_begin, -work.first_node);
    work.real_end = at_most(work.real_end, work.count - work.first_node);
  }

  // Parts are cut from the context, in whole tiles; the last one has the nodes, too.
  const int32_t first = p.window > 0 ? at_least(work.context - p.window + 1, 0) / Shape::kSlots * Shape::kSlots : 0;
  const int32_t length = work.context - first;
  int32_t wanted = p.num_splits > 0 ? p.num_splits : (length + kSlotsPerPart - 1) / kSlotsPerPart;
  wanted = at_least(at_most(wanted, launch.max_parts), 1);
  const int32_t tiles = (length + Shape::kSlots - 1) / Shape::kSlots;
  const int32_t size = at_least((tiles + wanted - 1) / wanted, 1) * Shape::kSlots;
  work.parts = at_least((length + size - 1) / size, 1);
  int32_t last_slot = work.context;  // nodes after the block's last one are nobody's ancestors
  if (p.ancestors != nullptr) last_slot = at_most(work.context + work.first_node + work.real_end, p.slots);
  if (work.real_begin >= work.real_end) {
    work.parts = 1;
    last_slot = first;
  }
  work.begin = first + work.part * size;
  work.end = work.part + 1 == work.parts ? last_slot : work.begin + size;

  work.lowest = 0;
  if (p.window > 0) {
    int32_t depth = p.ancestors == nullptr ? 0 : p.nodes;
    for (int32_t row = work.real_begin; p.ancestors != nullptr && row < work.real_end; ++row) {
      depth = at_most(depth, work.depths[work.first_node + row]);
    }
    work.lowest = work.context + depth - p.window + 1;
  }
  return work;
}

// The rows of a tile that a lane owns, for masks and positions.
struct LaneRow {
  const uint64_t* words;  // nullptr: the row is not real, or there is no tree
  int32_t position;
  float slope;
};

template <class Shape>
__device__ __forceinline__ LaneRow lane_row(const TreeAttentionLaunch& launch, const BlockWork& work, int row) {
  const TreeAttentionParams& p = launch.call;
  const int32_t packed = work.first_row + row, tree_row = packed / launch.group;
  LaneRow lane = {nullptr, work.context, 0.0f};
  const int32_t head = work.kv_head * launch.group + packed % launch.group;
  if (p.alibi_slopes != nullptr) lane.slope = p.alibi_slopes[head] * kLog2E;
  if (p.ancestors != nullptr && tree_row >= work.real_begin && tree_row < work.real_end) {
    const int32_t node = work.first_node + tree_row;
    lane.words = work.ancestors + int64_t(node) * p.words;
    lane.position = work.context + work.depths[node];
  }
  return lane;
}

// Scores in units of log2, with soft cap, ALiBi, and in masked tiles -inf where a row does not see a slot.
template <class Shape>
__device__ __forceinline__ void adjust_scores(float (&scores)[Shape::kWarpSlots / 8][4], const TreeAttentionParams& p,
                                              const BlockWork& work, const LaneRow (&rows)[2], int32_t begin,
                                              int lane) {
  if (p.softcap > 0.0f) {
    const float inner = p.scale / p.softcap, outer = p.softcap * kLog2E;
#pragma unroll
    for (int j = 0; j < Shape::kWarpSlots / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[j][e] = soft_tanh(scores[j][e] * inner) * outer;
    }
  } else {
    const float scale = p.scale * kLog2E;
#pragma unroll
    for (int j = 0; j < Shape::kWarpSlots / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[j][e] *= scale;
    }
  }
  const bool masked = p.window > 0 || begin + Shape::kWarpSlots > at_most(work.context, work.end);
  if (!masked && p.alibi_slopes == nullptr) return;

  uint64_t bits[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    bits[i] = ~uint64_t(0);
    if (masked && rows[i].words != nullptr) bits[i] = bits_from(rows[i].words, p.words, begin - work.context);
  }
#pragma unroll
  for (int j = 0; j < Shape::kWarpSlots / 8; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int32_t column = j * 8 + lane % 4 * 2 + c, slot = begin + column;
      int32_t position = slot;
      if ((p.window > 0 || p.alibi_slopes != nullptr) && slot >= work.context && slot < work.end) {
        position = work.context + work.depths[slot - work.context];
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int32_t distance = rows[i].position - position;
        float& score = scores[j][2 * i + c];
        if (p.alibi_slopes != nullptr) score -= rows[i].slope * float(distance);
        bool visible = !masked || (slot < work.end && (bits[i] >> column & 1) != 0);
        if (p.window > 0) visible = visible && distance >= 0 && distance < p.window;
        if (!visible) score = negative_infinity();
      }
    }
  }
}

// Joins the ancestor sets of the block's rows into `seen`, 32 nodes to a word, without what no row's window reaches.
__device__ __forceinline__ void join_ancestors(uint32_t* seen, const TreeAttentionParams& p, const BlockWork& work) {
  for (int32_t word = threadIdx.x; word < p.words; word += blockDim.x) {
    uint64_t joined = 0;
    for (int32_t row = work.real_begin; row < work.real_end; ++row) {
      const int32_t node = work.first_node + row;
      uint64_t bits = work.ancestors[int64_t(node) * p.words + word];
      for (uint64_t left = p.window > 0 ? bits : 0; left != 0; left &= left - 1) {
        const int32_t other = word * 64 + popcount((left & (~left + 1)) - 1);
        const bool near = other < p.nodes && work.depths[node] - work.depths[other] < p.window;
        if (!near) bits &= ~(left & (~left + 1));
      }
      joined |= bits;
    }
    seen[2 * word] = uint32_t(joined);
    seen[2 * word + 1] = uint32_t(joined >> 32);
  }
}

__device__ __forceinline__ bool is_seen(const uint32_t* seen, int32_t words, int32_t node) {
  return node / 64 < words && (seen[node / 32] >> (node % 32) & 1) != 0;
}

// The first tile from `tile` on that some row may see.
template <class Shape>
__device__ __forceinline__ int32_t next_tile(const uint32_t* seen, const TreeAttentionParams& p, const BlockWork& work,
                                             int32_t tile) {
  for (; tile < work.end && tile >= work.context; tile += Shape::kSlots) {
    for (int32_t slot = tile; slot < at_most(tile + Shape::kSlots, work.end); ++slot) {
      if (is_seen(seen, p.words, slot - work.context)) return tile;
    }
  }
  return tile;
}

__device__ __forceinline__ SlotPlace slot_place(const uint32_t* seen, const TreeAttentionParams& p,
                                                const BlockWork& work, int32_t slot) {
  bool readable = slot >= work.lowest && slot < work.end;
  if (readable && slot >= work.context) readable = is_seen(seen, p.words, slot - work.context);
  if (!readable) return {-1, 0};
  if (p.page_table == nullptr) return {work.request, slot};
  const int32_t page = p.page_table[work.request * p.page_table_stride + slot / p.page_size];
  return {page >= 0 && page < p.pages ? page : -1, slot % p.page_size};
}

// Starts the copies of one tile of K and one of V.
template <class T, class Shape>
__device__ __forceinline__ void load_tile(T* k_tile, T* v_tile, const SlotPlace* places, const TreeAttentionParams& p,
                                          const BlockWork& work) {
  constexpr int kChunks = Shape::kDim / 8;
  const T* k = static_cast<const T*>(p.k_cache) + work.kv_head * p.k_stride_head;
  const T* v = static_cast<const T*>(p.v_cache) + work.kv_head * p.v_stride_head;
#pragma unroll 4
  for (int i = threadIdx.x; i < Shape::kSlots * kChunks; i += Shape::kThreads) {
    const int slot = i / kChunks, column = i % kChunks * 8;
    const SlotPlace place = places[slot];
    const bool readable = place.page >= 0 && column < p.dim;
    const T* k_from = k + (readable ? place.page * p.k_stride_batch + place.row * p.k_stride_slot + column : 0);
    const T* v_from = v + (readable ? place.page * p.v_stride_batch + place.row * p.v_stride_slot + column : 0);
    cp_async_16(k_tile + slot * Shape::kPitch + column, k_from, readable ? 16 : 0);
    cp_async_16(v_tile + slot * Shape::kPitch + column, v_from, readable ? 16 : 0);
  }
}

template <class T, class Shape>
__device__ __forceinline__ void load_queries(T* q_tile, const TreeAttentionLaunch& launch, const BlockWork& work) {
  constexpr int kChunks = Shape::kDim / 8;
  const TreeAttentionParams& p = launch.call;
  const T* q = static_cast<const T*>(p.q) + work.request * p.q_stride_batch + work.first_q * p.q_stride_row;
  for (int i = threadIdx.x; i < Shape::kRows * kChunks; i += Shape::kThreads) {
    const int row = i / kChunks, column = i % kChunks * 8;
    const int32_t packed = work.first_row + row, tree_row = packed / launch.group;
    const int32_t head = work.kv_head * launch.group + packed % launch.group;
    const bool real = tree_row >= work.real_begin && tree_row < work.real_end && column < p.dim;
    const T* from = q + (real ? tree_row * p.q_stride_row + head * p.q_stride_head + column : 0);
    cp_async_16(q_tile + row * Shape::kPitch + column, from, real ? 16 : 0);
  }
}

}  // namespace specdec

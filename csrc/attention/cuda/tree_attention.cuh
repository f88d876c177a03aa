// Tree attention: every query row attends to its request's context and to its own ancestors among the draft nodes.
//
// What a block does. A block owns one (request, KV head), kRows packed query rows of it, and one split of its slots.
// Rows are the tree's rows times the query heads of the KV head's group, token-major, so that one matrix instruction
// serves all heads of a group and K and V are read once per KV head and row block. A warp owns 16 rows. Tiles of slots
// arrive by asynchronous copies, kStages deep; where a slot lies (its page) is looked up one tile further ahead, by one
// thread per slot.
//
// Two phases. Tiles inside the context have no mask and load none (with a window, except where it begins). In the tail,
// from the last tile of the context on, a lane takes 64 bits of its two rows' ancestor sets into registers and shifts.
// The block first joins the sets of all its rows in shared memory: a tail tile that none of them sees is left out, and
// a slot that none of them sees is not read, nor is its page looked up.
//
// A slot that some rows see and others don't may be NaN or Inf, too. Where a row does not see, its score is replaced,
// whatever it is; but V is multiplied by a weight of 0, and 0 * NaN is NaN. So in masked tiles a warp looks at the
// values it is about to multiply. Those that are not finite become 0, and are added to the rows that see them.
//
// Split over the slots. The number of splits is worked out by every block from the request's context length and its
// number of rows; the grid has room for as many as the cache's capacity allows, and blocks without a split end at once.
// Splits leave their
// unnormalised sums in scratch memory, and the last block to arrive joins them in the order of the slots, so the result
// does not depend on who was last. It also sets the counter back to zero. A request with one split writes its result
// directly. Scratch is sized for requests that fill the cache; where a large batch would need more than 256 MiB,
// several launches serve a slice of it each, one after the other, through the same scratch and counters.
//
// A row's result depends on its request alone, to the last bit: splits come from the context length and the rows of the
// request that are real, tiles lie on a grid, and each row's sums are made in the same order whatever the size of the
// block. So a request that asks with fewer rows may be cut into more splits, and differ in rounding.
//
// Bytes: K and V once per KV head and row block (of 128 rows; of 64 for dims above 192 on devices with 99 KiB), q once
// per split, out once; in the last split 8 per tree row and 64 nodes, twice, and 8 more per packed row and tail tile; 4
// per slot for paged caches; with S > 1 splits 2 * S * (dim + 2) * 4 of scratch per
// real row. That is a quarter of K and V at most in 16 bits: a split has at least kSlotsPerRow slots for each row.
//
// Packing rows of a group is what XQA does, the split is Flash-Decoding's, the softmax FlashAttention-2's.
#pragma once

#include "attention/cuda/tree_attention_tiles.cuh"

namespace specdec::cuda {

// A launch: the call and what the host derives from it. It serves `requests` of the batch, from first_request on.
struct TreeAttentionLaunch {
  TreeAttentionParams call;
  int32_t group, max_queries, row_blocks, max_splits;
  int32_t first_request, requests;
};

// What a block works on. The same in all of its threads.
struct BlockWork {
  int32_t request, kv_head, first_row, split, splits;
  int32_t first_q, own_rows;  // of the request, in q
  int32_t first_node;
  int32_t rows;  // of the request that are real, times the query heads of the group
  int32_t context;
  int32_t begin, end;            // slots of this split
  int32_t lowest;                // slots before it are outside of every row's window
  int32_t unmasked;              // context slots from it on are inside of every row's window
  int32_t real_begin, real_end;  // tree rows of this block that are real
  const uint64_t* ancestors;     // of the request
  const int32_t* depths;
};

__host__ __device__ __forceinline__ int32_t at_least(int32_t a, int32_t b) { return a > b ? a : b; }
__host__ __device__ __forceinline__ int32_t at_most(int32_t a, int32_t b) { return a < b ? a : b; }

// A split reads 2 * dim * 2 bytes a slot, and its sums take 2 * dim * 4 a row, written and read.
constexpr int32_t kSlotsPerRow = 8;

// Into how many splits to cut this many slots: 256 a split up to 16 splits, then 512 a split up to about 256 blocks over
// the KV heads, which fills the largest GPUs twice with a single request; but with so many slots a split that what it
// leaves for `rows` rows is little next to what it reads.
__host__ __device__ __forceinline__ int32_t splits_of(int32_t slots, int32_t kv_heads, int32_t num_splits,
                                                      int32_t rows) {
  if (num_splits > 0) return num_splits;
  const int32_t most = at_most(at_least(256 / kv_heads, 16), 128);
  const int32_t few = at_most(slots / 256 + (slots % 256 != 0), 16);
  const int32_t many = at_most(slots / 512 + (slots % 512 != 0), most);
  return at_least(at_most(at_least(few, many), slots / kSlotsPerRow / at_least(rows, 1)), 1);
}

// Rows, nodes and context of the block's request.
template <class Shape>
__device__ __forceinline__ BlockWork block_of(const TreeAttentionLaunch& launch) {
  const TreeAttentionParams& p = launch.call;
  BlockWork work;
  int32_t rest = int32_t(blockIdx.x);
  work.split = rest % launch.max_splits;
  rest /= launch.max_splits;
  work.first_row = rest % launch.row_blocks * Shape::kRows;
  rest /= launch.row_blocks;
  work.kv_head = rest % p.kv_heads;
  work.request = launch.first_request + rest / p.kv_heads;

  work.first_q = 0;
  work.own_rows = p.queries;
  if (p.offsets != nullptr) {
    work.first_q = at_most(at_least(p.offsets[work.request], 0), p.queries);
    const int32_t end = at_most(at_least(p.offsets[work.request + 1], work.first_q), p.queries);
    work.own_rows = at_most(end - work.first_q, launch.max_queries);
  }
  work.context = at_most(at_least(p.context_lens[work.request], 0), p.slots);

  // Real rows: those of this block whose node exists.
  work.real_begin = work.first_row / launch.group;
  work.real_end = at_most((work.first_row + Shape::kRows - 1) / launch.group + 1, work.own_rows);
  work.first_node = 0;
  int32_t first_row = 0, end_row = work.own_rows;  // of the request that are real
  work.ancestors = nullptr;
  work.depths = nullptr;
  if (p.ancestors != nullptr) {
    const int32_t tree = p.topology_batch > 1 ? work.request : 0;
    work.ancestors = p.ancestors + int64_t(tree) * p.nodes * p.words;
    work.depths = p.depths + int64_t(tree) * p.nodes;
    // Beyond these bounds no row has a node, whatever the number is.
    const int64_t first = int64_t(p.query_start) + (p.query_starts == nullptr ? 0 : p.query_starts[work.request]);
    work.first_node = first > p.nodes ? p.nodes : first < -int64_t(p.queries) ? -p.queries : int32_t(first);
    const int32_t count = at_most(at_least(p.num_nodes[tree], 0), p.nodes);
    first_row = at_least(first_row, -work.first_node);
    end_row = at_most(end_row, count - work.first_node);
    work.real_begin = at_least(work.real_begin, first_row);
    work.real_end = at_most(work.real_end, end_row);
  }
  work.rows = at_least(end_row - first_row, 0) * launch.group;
  return work;
}

template <class Shape>
__device__ __forceinline__ BlockWork block_work(const TreeAttentionLaunch& launch) {
  const TreeAttentionParams& p = launch.call;
  BlockWork work = block_of<Shape>(launch);

  // Splits are cut from the context, in whole tiles; the last one has the nodes, too.
  const int32_t first = p.window > 0 ? at_least(work.context - p.window + 1, 0) / Shape::kSlots * Shape::kSlots : 0;
  const int32_t length = work.context - first;
  const int32_t wanted = at_most(splits_of(length, p.kv_heads, p.num_splits, work.rows), launch.max_splits);
  const int32_t tiles = length / Shape::kSlots + (length % Shape::kSlots != 0);
  const int32_t size = at_least((tiles + wanted - 1) / wanted, 1) * Shape::kSlots;
  work.splits = at_least(length / size + (length % size != 0), 1);
  int32_t last_slot = work.context;  // nodes after the block's last one are nobody's ancestors
  if (p.ancestors != nullptr) last_slot = at_most(work.context + at_least(work.first_node + work.real_end, 0), p.slots);
  if (work.real_begin >= work.real_end) {
    work.splits = 1;
    last_slot = first;
  }
  work.begin = first + at_most(work.split, work.splits - 1) * size;
  work.end = work.split + 1 == work.splits ? last_slot : work.begin + size;

  work.lowest = work.unmasked = 0;
  if (p.window > 0) {
    int32_t least = p.nodes, most = 0;  // of the rows' depths
    if (p.ancestors == nullptr) least = 0;
    for (int32_t row = work.real_begin + int32_t(threadIdx.x) % kWarpSize;
         p.ancestors != nullptr && row < work.real_end; row += kWarpSize) {
      const int32_t depth = work.depths[work.first_node + row];
      least = at_most(least, depth);
      most = at_least(most, depth);
    }
#pragma unroll
    for (int bit = 1; bit < kWarpSize; bit *= 2) {
      least = at_most(least, warp_shuffle_xor(least, bit));
      most = at_least(most, warp_shuffle_xor(most, bit));
    }
    work.lowest = work.context + least - p.window + 1;
    work.unmasked = work.context + most - p.window + 1;
  }
  return work;
}

// The rows of a tile that a lane owns, for masks and positions.
struct LaneRow {
  const uint64_t* words;  // nullptr: the row is not real, or there is no tree
  int32_t position;       // with a window or ALiBi
  float slope;
};

__device__ __forceinline__ LaneRow lane_row(const TreeAttentionLaunch& launch, const BlockWork& work, int row) {
  const TreeAttentionParams& p = launch.call;
  const int32_t packed = work.first_row + row, tree_row = packed / launch.group;
  LaneRow lane = {nullptr, work.context, 0.0f};
  const int32_t head = work.kv_head * launch.group + packed % launch.group;
  if (p.alibi_slopes != nullptr) lane.slope = p.alibi_slopes[head] * kLog2E;
  if (p.ancestors != nullptr && tree_row >= work.real_begin && tree_row < work.real_end) {
    const int32_t node = work.first_node + tree_row;
    lane.words = work.ancestors + int64_t(node) * p.words;
    if (p.window > 0 || p.alibi_slopes != nullptr) lane.position = work.context + work.depths[node];
  }
  return lane;
}

// 64 bits of a set, from bit `first` on. Bits before the first one (the context) are ones, those after the end zeros.
__device__ __forceinline__ uint64_t bits_from(const uint64_t* words, int32_t count, int32_t first) {
  if (first <= -64) return ~uint64_t(0);
  const int32_t word = first < 0 ? -1 : first / 64;
  const int32_t shift = first - word * 64;
  const uint64_t low = word < 0 ? ~uint64_t(0) : (word < count ? words[word] : 0);
  if (shift == 0) return low;
  const uint64_t high = word + 1 < count ? words[word + 1] : 0;
  return low >> shift | high << (64 - shift);
}

// Whether there may be a slot in a tile that some row does not see: before a window, in the tree, or past the end.
template <class Shape>
__device__ __forceinline__ bool is_masked(const BlockWork& work, int32_t begin) {
  return begin < work.unmasked || begin + Shape::kSlots > at_most(work.context, work.end);
}

// Scores in units of log2, with soft cap, ALiBi, and in masked tiles -inf where a row does not see a slot. Returns
// which of the lane's scores are of slots that their rows see: bit 4 * j + e for scores[j][e].
template <class Shape>
__device__ __forceinline__ uint32_t adjust_scores(float (&scores)[Shape::kSlots / 8][4], const TreeAttentionParams& p,
                                                  const BlockWork& work, const LaneRow (&rows)[2], int32_t begin,
                                                  bool masked, int lane) {
  static_assert(Shape::kSlots <= 64, "a bit for each score");
  const bool capped = p.softcap > 0.0f;
  const float scale = capped ? p.scale / p.softcap : p.scale * kLog2E, cap = p.softcap * kLog2E;
#pragma unroll
  for (int j = 0; j < Shape::kSlots / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      scores[j][e] = rounded_product(scores[j][e], scale);  // the greatest less the maximum is exactly 0
      if (capped) scores[j][e] = soft_tanh(scores[j][e]) * cap;
    }
  }
  if (!masked && p.alibi_slopes == nullptr) return kAllLanes;

  uint32_t seen = kAllLanes;
  uint64_t bits[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    bits[i] = ~uint64_t(0);
    if (masked && rows[i].words != nullptr) bits[i] = bits_from(rows[i].words, p.words, begin - work.context);
  }
#pragma unroll
  for (int j = 0; j < Shape::kSlots / 8; ++j) {
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
        if (!visible) {
          score = negative_infinity();
          seen &= ~(1u << (4 * j + 2 * i + c));
        }
      }
    }
  }
  return seen;
}

// The nodes that some row of the block sees, 32 to a word, in shared memory. A word of zeros follows.
struct SeenNodes {
  int32_t* bits;
  int32_t words;

  // 32 nodes from `node` on, which may be below 0: there is the context, which is seen.
  __device__ __forceinline__ uint32_t from(int32_t node) const {
    if (node <= -32) return kAllLanes;
    const int32_t word = node < 0 ? -1 : node / 32, shift = node - word * 32;
    const uint32_t low = word < 0 ? kAllLanes : word < words ? uint32_t(bits[word]) : 0;
    if (shift == 0) return low;
    const uint32_t high = word + 1 < words ? uint32_t(bits[word + 1]) : 0;
    return low >> shift | high << (32 - shift);
  }
};

// Joins the ancestor sets of the block's rows, without what no row's window reaches. All threads of the block.
__device__ __forceinline__ void join_ancestors(const SeenNodes& seen, const TreeAttentionParams& p,
                                               const BlockWork& work) {
  for (int32_t word = threadIdx.x; word < seen.words; word += blockDim.x) seen.bits[word] = 0;
  block_sync();
  const int32_t rows = at_least(work.real_end - work.real_begin, 0);
  for (int32_t i = threadIdx.x; i < rows * p.words; i += blockDim.x) {
    const int32_t node = work.first_node + work.real_begin + i / p.words, word = i % p.words;
    uint64_t bits = work.ancestors[int64_t(node) * p.words + word];
    for (uint64_t left = p.window > 0 ? bits : 0; left != 0; left &= left - 1) {
      const uint64_t lowest = left & (~left + 1);
      const int32_t other = word * 64 + popcount(lowest - 1);
      if (other >= p.nodes || work.depths[node] - work.depths[other] >= p.window) bits &= ~lowest;
    }
    if (uint32_t(bits) != 0) atomic_or(seen.bits + 2 * word, int32_t(uint32_t(bits)));
    if (uint32_t(bits >> 32) != 0) atomic_or(seen.bits + 2 * word + 1, int32_t(uint32_t(bits >> 32)));
  }
}

// The first tile from `tile` on that some row may see.
template <class Shape>
__device__ __forceinline__ int32_t next_tile(const SeenNodes& seen, const BlockWork& work, int32_t tile) {
  for (; tile >= work.context && tile < work.end; tile += Shape::kSlots) {
    const int32_t node = tile - work.context;
    uint32_t some = seen.from(node);
    if constexpr (Shape::kSlots < 32) some &= (1u << Shape::kSlots) - 1;
    if constexpr (Shape::kSlots > 32) some |= seen.from(node + 32);
    if (some != 0) break;
  }
  return tile;
}

}  // namespace specdec::cuda

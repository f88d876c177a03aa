// A level of each request's draft tree: candidates into the pool, and the best of them become nodes and frontier.
//
// One block owns one request, and its threads share the level's candidates: thread t has t, t + 256, ... A candidate is
// 8 bytes read and 16 written; the best `width` of them are selected without a sort (best_scores.cuh), and only those
// are put in order, each thread counting for its own one how many are better: 256 comparisons at most, in shared
// memory. From there on thread t has column t of the frontier, so what a node needs of the others (its next sibling)
// is a look at the columns behind it. A node's ancestors are its parent's words, which the launch before has written,
// and itself. A level of 8 rows of 8 costs what a launch costs.
//
// Of the pool only the rows of this level's parents are read. What they say is checked where it is an index.
#pragma once

#include "common/cuda/block_team.cuh"
#include "common/cuda/device.cuh"
#include "topology/candidate.h"
#include "topology/cuda/best_scores.cuh"

namespace specdec::cuda {

static_assert(kMaxGrowWidth <= kBestThreads, "a thread for each column of the frontier");

// The parameters with every pointer at the request's first element.
__device__ inline GrowTreeParams request_of(GrowTreeParams p, int64_t request) {
  const int64_t level = request * p.rows * p.branching, frontier = request * p.width, pool = request * p.size;
  const int64_t tree = request * p.nodes;
  p.top_logprobs += level, p.top_tokens += level;
  p.frontier_tokens += frontier, p.parent_rows += frontier, p.frontier_scores += frontier;
  p.tokens += pool, p.scores += pool, p.parents += pool, p.expanded += pool;
  p.candidates += tree, p.node_parents += tree, p.depths += tree, p.ancestors += tree * p.words;
  p.first_child += tree, p.next_sibling += tree;
  p.num_nodes += request, p.status += request;
  return p;
}

__device__ inline void blank_pool(const GrowTreeParams& p) {
  for (int32_t place = threadIdx.x; place < p.size; place += kBestThreads) {
    p.tokens[place] = p.parents[place] = p.expanded[place] = -1;
    p.scores[place] = negative_infinity();
  }
  for (int32_t node = threadIdx.x; node < p.nodes; node += kBestThreads) {
    p.candidates[node] = p.node_parents[node] = p.first_child[node] = p.next_sibling[node] = -1;
    p.depths[node] = 0;
  }
  const int64_t words = int64_t{p.nodes} * p.words;
  for (int64_t word = threadIdx.x; word < words; word += kBestThreads) p.ancestors[word] = word == 0 ? 1 : 0;
}

// Writes the level's candidates, and returns this thread's GrowStatus bits.
__device__ inline int32_t take_candidates(const GrowTreeParams& p, bool active) {
  int32_t status = 0;
  for (int32_t index = threadIdx.x; index < p.rows * p.branching; index += kBestThreads) {
    const int32_t place = p.first_candidate + index;
    const int32_t parent = p.level == 0 ? -1 : p.candidates[p.first_parent + index / p.branching];
    const bool grows = active && (p.level == 0 || (parent >= 0 && parent < p.first_candidate));
    const float above = grows && p.level > 0 ? p.scores[parent] : 0.0f;
    const Candidate found = candidate_of(p, grows ? p.top_tokens[index] : -1, p.top_logprobs[index], above);
    status |= found.status;
    p.tokens[place] = found.token;
    p.scores[place] = found.score;
    p.parents[place] = found.token >= 0 ? parent : -1;
    p.expanded[place] = -1;
  }
  return status;
}

__global__ void __launch_bounds__(kBestThreads) grow_tree_kernel(GrowTreeParams all) {
  SPECDEC_SHARED(uint32_t, slots, [TeamReducer::kWords]);
  SPECDEC_SHARED(int32_t, histogram, [kBestThreads]);
  SPECDEC_SHARED(uint32_t, byte_and_count, [2]);
  SPECDEC_SHARED(int32_t, best_index, [kBestThreads]);  // by index
  SPECDEC_SHARED(uint32_t, best_key, [kBestThreads]);   // likewise
  SPECDEC_SHARED(int32_t, ordered_index, [kBestThreads]);
  SPECDEC_SHARED(int32_t, bits, );
  const GrowTreeParams p = request_of(all, blockIdx.x);
  const bool active = p.active == nullptr || p.active[blockIdx.x] != 0;
  const int32_t thread = threadIdx.x, count = p.rows * p.branching;
  TeamReducer reduce({thread, kBestThreads}, slots);
  if (thread == 0) bits = 0;
  if (p.level == 0) blank_pool(p);
  block_sync();
  const int32_t status = take_candidates(p, active);
  if (status != 0) atomic_or(&bits, status);

  // A thread reads what it has written itself.
  const auto key_of = [&](int32_t index) {
    const int32_t token = p.tokens[p.first_candidate + index];
    return token < 0 || ends_text(p, token) ? 0u : ordered(p.scores[p.first_candidate + index]);
  };
  const Cut cut = find_cut(reduce, {slots, histogram, byte_and_count}, count, p.width, key_of);
  for_each_best(reduce, cut, count, key_of, [&](int32_t place, int32_t index) {
    best_index[place] = index;
    best_key[place] = key_of(index);
  });
  block_sync();
  if (thread < cut.found) {
    int32_t better = 0;
    for (int32_t other = 0; other < cut.found; ++other) {
      better += best_key[other] > best_key[thread] || (best_key[other] == best_key[thread] && other < thread);
    }
    ordered_index[better] = best_index[thread];
  }
  block_sync();

  if (thread < p.width) {
    const bool found = thread < cut.found;
    const int32_t index = found ? ordered_index[thread] : -1, row = found ? index / p.branching : -1;
    const int32_t node = p.first_node + thread, place = p.first_candidate + index;
    int32_t sibling = -1;
    for (int32_t other = cut.found - 1; other > thread; --other) {
      if (ordered_index[other] / p.branching == row) sibling = p.first_node + other;
    }
    p.frontier_tokens[thread] = found ? p.tokens[place] : -1;
    p.parent_rows[thread] = row;
    p.frontier_scores[thread] = found ? p.scores[place] : negative_infinity();
    if (found) p.expanded[place] = node;
    p.candidates[node] = found ? place : -1;
    p.node_parents[node] = found ? p.first_parent + row : -1;
    p.depths[node] = found ? p.level + 1 : 0;
    p.first_child[node] = -1;
    p.next_sibling[node] = sibling;
  }
  if (thread < p.rows) {
    int32_t child = -1;
    for (int32_t other = cut.found - 1; other >= 0; --other) {
      if (ordered_index[other] / p.branching == thread) child = p.first_node + other;
    }
    p.first_child[p.first_parent + thread] = child;
  }
  for (int32_t at = thread; at < p.width * p.words; at += kBestThreads) {
    const int32_t column = at / p.words, word = at % p.words, node = p.first_node + column;
    uint64_t seen = 0;
    if (column < cut.found) {
      const int64_t parent = p.first_parent + ordered_index[column] / p.branching;
      seen = p.ancestors[parent * p.words + word];
      if (node / 64 == word) seen |= uint64_t{1} << (node % 64);
    }
    p.ancestors[int64_t{node} * p.words + word] = seen;
  }
  if (thread == 0) {
    if (cut.found > 0) {
      *p.num_nodes = p.first_node + cut.found;
    } else if (p.level == 0) {
      *p.num_nodes = 1;
    }
    *p.status = bits | (p.level == 0 ? 0 : *p.status);
  }
}

}  // namespace specdec::cuda

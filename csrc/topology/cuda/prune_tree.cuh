// The best candidates of each request's pool behind its root, and their topology.
//
// One block owns one request. The candidates that stay are selected without a sort (best_scores.cuh) and get their
// nodes in the order of the pool; 4 bytes per candidate are read five times, from the first cache but for the first
// time. A parent's node is found by bisection among those that stay, which lie in shared memory in rising order: six
// steps in a tree of 60. The tables are then made as build_topology makes them, in the same shared memory.
#pragma once

#include "common/cuda/block_team.cuh"
#include "common/cuda/device.cuh"
#include "topology/cuda/best_scores.cuh"
#include "topology/cuda/build_topology.cuh"
#include "topology/params.h"

namespace specdec::cuda {

// The node of a candidate, or -1. kept[1] to kept[count - 1] rise.
__device__ inline int32_t node_of(const int32_t* kept, int32_t count, int32_t candidate) {
  int32_t low = 1, high = count;  // the first that is not below the candidate lies in [low, high]
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (kept[middle] < candidate) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < count && kept[low] == candidate ? low : -1;
}

__global__ void __launch_bounds__(kBestThreads) prune_tree_kernel(PruneTreeParams p) {
  SPECDEC_SHARED(uint32_t, slots, [TeamReducer::kWords]);
  SPECDEC_SHARED(int32_t, histogram, [kBestThreads]);
  SPECDEC_SHARED(uint32_t, byte_and_count, [2]);
  const SharedTree tree(p.nodes);
  int32_t* const kept = tree.up;  // the candidate of each node but the root, until the tables are made
  const int64_t request = blockIdx.x, pool = request * p.size, first = request * p.nodes;
  const int32_t thread = threadIdx.x;
  TeamReducer reduce({thread, kBestThreads}, slots);
  const auto key_of = [&](int32_t index) {
    const float score = p.scores[pool + index];
    return score > negative_infinity() ? ordered(score) : 0u;
  };
  const Cut cut = find_cut(reduce, {slots, histogram, byte_and_count}, p.size, p.nodes - 1, key_of);
  for_each_best(reduce, cut, p.size, key_of, [&](int32_t place, int32_t index) { kept[place + 1] = index; });
  const int32_t count = 1 + cut.found;
  if (thread == 0) {
    *tree.status = 0;
    tree.first_child[0] = -1;
  }
  block_sync();

  int32_t status = 0;
  for (int32_t node = thread; node < p.nodes; node += kBestThreads) {
    const bool exists = node > 0 && node < count;
    const int32_t candidate = exists ? kept[node] : -1;
    int32_t parent = -1;
    if (exists) {
      const int32_t above = p.parents[pool + candidate];
      parent = above == -1 ? 0 : node_of(kept, count, above);
      if (parent < 0) {
        status |= kParentOutOfRange;
      } else if (parent >= node) {
        status |= kParentNotBefore;
        parent = -1;
      }
    }
    tree.parents[node] = parent;
    tree.first_child[node + 1] = -1;
    p.tree_tokens[first + node] = exists ? p.tokens[pool + candidate] : node == 0 ? p.root_tokens[request] : -1;
    p.pool_ids[first + node] = candidate;
    p.draft_nodes[first + node] = exists ? p.expanded[pool + candidate] : node == 0 ? 0 : -1;
  }
  if (status != 0) atomic_or(tree.status, status);
  block_sync();
  write_tables(tree,
               {p.node_parents + first, p.depths + first, p.ancestors + first * p.words, p.first_child + first,
                p.next_sibling + first, p.nodes, p.words},
               count);
  if (thread == 0) {
    p.num_nodes[request] = count;
    p.status[request] = *tree.status;
  }
}

}  // namespace specdec::cuda

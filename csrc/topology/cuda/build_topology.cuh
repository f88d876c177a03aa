// Ancestor sets, depths and links of each request's tree.
//
// One block owns one request. Its threads share the nodes, thread t has nodes t, t + threads, ... The tree is read once
// and lives in shared memory (20 bytes per node); 4 bytes per node are read from global memory and 16 + 8 * words are
// written, so for real trees (tens of nodes, one or two words) the kernel costs what a launch costs.
//
// Ancestors without a walk to the root, which would take 1,024 steps in a chain of 1,024: nodes are seen in groups of
// 64, one word of an ancestor set each. A thread walks from its node to the first ancestor outside of the node's group,
// 63 steps at most, since parents come first, and keeps the bits it met (the group's word of the node's set) and that
// outside ancestor, `up`. The rest of the set is then one hop per group: the word of `up`, of up[up], and so on.
//
// Links: one warp visits the nodes from the last to the first, 32 at a time. Lanes that share a parent find each other
// with one match instruction: a node's next sibling is the next such lane, or for the last of them, the first child
// known so far; the first of them becomes the first child. This needs no atomics, so the order is always ascending.
//
// A parent that doesn't come before its node is replaced by -1 first. Every walk therefore ends, and every index is
// inside of the block's arrays, whatever the input holds.
#pragma once

#include "common/cuda/device.cuh"
#include "topology/params.h"

namespace specdec::cuda {

constexpr int32_t kBuildTopologyMaxNodes = 2048;  // 40 KiB of shared memory, which every GPU grants without asking

struct SharedTree {
  uint64_t* group_bits;  // [nodes] the node's ancestors inside of its own group of 64, itself included
  int32_t* parents;      // [nodes]
  int32_t* up;           // [nodes] the nearest ancestor in an earlier group, or -1
  int32_t* first_child;  // [nodes + 1] of node - 1; entry 0 is the first root
  int32_t* status;       // [1]

  __device__ explicit SharedTree(int32_t nodes) {
    SharedMemory memory;
    group_bits = memory.take<uint64_t>(nodes);
    parents = memory.take<int32_t>(nodes);
    up = memory.take<int32_t>(nodes);
    first_child = memory.take<int32_t>(nodes + 1);
    status = memory.take<int32_t>(1);
  }
  static size_t bytes(int32_t nodes) {
    return SharedMemory::bytes<uint64_t>(nodes) + 2 * SharedMemory::bytes<int32_t>(nodes) +
           SharedMemory::bytes<int32_t>(nodes + 1) + SharedMemory::bytes<int32_t>(1);
  }
};

// Reads the parents of nodes below count and keeps the sound ones.
__device__ inline void load_sound_parents(const SharedTree& tree, const int32_t* parents, int32_t count,
                                          int32_t nodes) {
  int32_t status = 0;
  for (int32_t node = threadIdx.x; node < nodes; node += blockDim.x) {
    int32_t parent = node < count ? parents[node] : -1;
    if (parent < -1 || parent >= count) {
      status |= kParentOutOfRange;
      parent = -1;
    } else if (parent >= node) {
      status |= kParentNotBefore;
      parent = -1;
    }
    tree.parents[node] = parent;
    tree.first_child[node + 1] = -1;
  }
  if (status != 0) atomic_or(tree.status, status);
}

__device__ inline void walk_own_group(const SharedTree& tree, int32_t node) {
  const int32_t group_start = node & ~63;
  uint64_t bits = 0;
  int32_t ancestor = node;
  while (ancestor >= group_start) {
    bits |= uint64_t{1} << (ancestor & 63);
    ancestor = tree.parents[ancestor];
  }
  tree.group_bits[node] = bits;
  tree.up[node] = ancestor;
}

// Run by all lanes of one warp, and by no other.
__device__ inline void link_children(const SharedTree& tree, int32_t* next_sibling, int32_t count, int32_t lane) {
  for (int32_t start = (count - 1) & ~(kWarpSize - 1); start >= 0; start -= kWarpSize) {
    const int32_t node = start + lane;
    const bool exists = node < count;
    const int32_t slot = exists ? tree.parents[node] + 1 : -1;  // of first_child
    const uint32_t siblings = warp_match(slot);
    const uint32_t later = siblings & ~((uint32_t{2} << lane) - 1);
    const int32_t known = exists ? tree.first_child[slot] : -1;
    warp_sync();  // all have read the old first child before one lane replaces it
    if (exists) {
      next_sibling[node] = later != 0 ? start + lowest_bit(later) : known;
      if (lowest_bit(siblings) == lane) tree.first_child[slot] = node;
    }
    warp_sync();
  }
}

// Writes one node's ancestor words and returns its depth.
__device__ inline int32_t write_ancestors(const SharedTree& tree, uint64_t* row, int32_t node, bool exists,
                                          int32_t words) {
  int32_t ancestor = exists ? node : -1;
  int32_t ancestors = 0;
  for (int32_t word = words - 1; word >= 0; --word) {
    uint64_t bits = 0;
    if (ancestor >= word * 64) {
      bits = tree.group_bits[ancestor];
      ancestors += popcount(bits);
      ancestor = tree.up[ancestor];
    }
    row[word] = bits;
  }
  return exists ? ancestors - 1 : 0;
}

// Where one request's tables lie.
struct TreeRows {
  int32_t* parents;     // [nodes]
  int32_t* depths;      // [nodes]
  uint64_t* ancestors;  // [nodes, words]
  int32_t* first_child;
  int32_t* next_sibling;
  int32_t nodes, words;
};

// Writes a request's tables from the parents in shared memory, which are sound, and the links there, which are -1. All
// threads of the block call it behind a barrier.
__device__ inline void write_tables(const SharedTree& tree, const TreeRows& rows, int32_t count) {
  for (int32_t node = threadIdx.x; node < count; node += blockDim.x) walk_own_group(tree, node);
  // The last warp has the fewest nodes to walk from.
  const int32_t lane = int32_t(threadIdx.x) - (int32_t(blockDim.x) - kWarpSize);
  if (lane >= 0) link_children(tree, rows.next_sibling, count, lane);
  block_sync();
  for (int32_t node = threadIdx.x; node < rows.nodes; node += blockDim.x) {
    const bool exists = node < count;
    rows.parents[node] = tree.parents[node];
    rows.first_child[node] = tree.first_child[node + 1];
    if (!exists) rows.next_sibling[node] = -1;
    rows.depths[node] = write_ancestors(tree, rows.ancestors + int64_t{node} * rows.words, node, exists, rows.words);
  }
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads) build_topology_kernel(BuildTopologyParams p) {
  const SharedTree tree(p.nodes);
  const int64_t request = blockIdx.x;
  const int64_t first = request * p.nodes;
  const int32_t wanted = p.num_nodes[request];
  const int32_t count = min(max(wanted, 0), p.nodes);

  if (threadIdx.x == 0) {
    *tree.status = wanted == count ? 0 : kNumNodesOutOfRange;
    tree.first_child[0] = -1;
  }
  block_sync();
  load_sound_parents(tree, p.parents + first, count, p.nodes);
  block_sync();
  write_tables(tree,
               {p.parents_out + first, p.depths + first, p.ancestors + first * p.words, p.first_child + first,
                p.next_sibling + first, p.nodes, p.words},
               count);
  if (threadIdx.x == 0) {
    p.num_nodes_out[request] = count;
    p.status[request] = *tree.status;
  }
}

// Refuses trees of more than kBuildTopologyMaxNodes nodes with cudaErrorInvalidValue.
template <int kThreads>
cudaError_t build_topology(const BuildTopologyParams& p, int device, cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  if (p.nodes > kBuildTopologyMaxNodes) return cudaErrorInvalidValue;
  return launch(build_topology_kernel<kThreads>, dim3(p.batch), dim3(kThreads), SharedTree::bytes(p.nodes), device,
                stream, p);
}

}  // namespace specdec::cuda

// Ancestor sets, depths and links of each request's tree, on the CPU.
//
// One thread owns one request and visits its nodes once forwards and once backwards. Forwards, a node's ancestor words
// are its parent's words with its own bit added: parents come first, so they are done. Backwards, a node is pushed to
// the front of its parent's list of children, so every list ends up in ascending order without any scratch memory.
// Each request reads 4 bytes and writes 16 + 8 * words bytes per node, so memory is all it costs; small batches stay on
// the calling thread, since waking others takes longer than the work.
#include <algorithm>
#include <cstdint>

#include "topology/cpu/entry_points.h"

namespace specdec::cpu {

namespace {

constexpr int64_t kMinWordsPerThread = 16384;  // about 10 us of work, several times the cost of starting a thread

// Writes the sound parents of one request and returns its status. Afterwards every parent is -1 or an earlier node,
// whatever the input was, which is what the passes below rely on to stay inside their arrays.
int32_t sound_parents(const int32_t* parents, int32_t* parents_out, int32_t count, int32_t nodes) {
  int32_t status = 0;
  for (int32_t node = 0; node < count; ++node) {
    const int32_t parent = parents[node];
    const bool out_of_range = parent < -1 || parent >= count;
    const bool not_before = !out_of_range && parent >= node;
    status |= out_of_range ? kParentOutOfRange : 0;
    status |= not_before ? kParentNotBefore : 0;
    parents_out[node] = out_of_range || not_before ? -1 : parent;
  }
  std::fill(parents_out + count, parents_out + nodes, -1);
  return status;
}

void depths_and_ancestors(const int32_t* parents, int32_t* depths, uint64_t* ancestors, int32_t count, int32_t nodes,
                          int32_t words) {
  for (int32_t node = 0; node < count; ++node) {
    const int32_t parent = parents[node];
    uint64_t* row = ancestors + int64_t{node} * words;
    if (parent >= 0) {
      std::copy_n(ancestors + int64_t{parent} * words, words, row);
    } else {
      std::fill_n(row, words, 0);
    }
    row[node / 64] |= uint64_t{1} << (node % 64);
    depths[node] = parent >= 0 ? depths[parent] + 1 : 0;
  }
  std::fill(depths + count, depths + nodes, 0);
  std::fill(ancestors + int64_t{count} * words, ancestors + int64_t{nodes} * words, 0);
}

void links(const int32_t* parents, int32_t* first_child, int32_t* next_sibling, int32_t count, int32_t nodes) {
  std::fill(first_child, first_child + nodes, -1);
  std::fill(next_sibling + count, next_sibling + nodes, -1);
  int32_t first_root = -1;
  for (int32_t node = count - 1; node >= 0; --node) {
    int32_t& first = parents[node] >= 0 ? first_child[parents[node]] : first_root;
    next_sibling[node] = first;
    first = node;
  }
}

}  // namespace

}  // namespace specdec::cpu

namespace specdec {

using namespace cpu;

void build_topology_cpu(const BuildTopologyParams& p, int threads) {
  const int64_t work = int64_t{p.batch} * p.nodes * (p.words + 2);
  const int pool = static_cast<int>(std::clamp<int64_t>(work / kMinWordsPerThread, 1, std::max(threads, 1)));
#pragma omp parallel for num_threads(pool) schedule(static) if (pool > 1)
  for (int32_t request = 0; request < p.batch; ++request) {
    const int64_t row = int64_t{request} * p.nodes;
    const int32_t count = std::clamp(p.num_nodes[request], 0, p.nodes);
    int32_t* parents = p.parents_out + row;
    const int32_t status = sound_parents(p.parents + row, parents, count, p.nodes);
    depths_and_ancestors(parents, p.depths + row, p.ancestors + row * p.words, count, p.nodes, p.words);
    links(parents, p.first_child + row, p.next_sibling + row, count, p.nodes);
    p.num_nodes_out[request] = count;
    p.status[request] = status | (count != p.num_nodes[request] ? kNumNodesOutOfRange : 0);
  }
}

}  // namespace specdec

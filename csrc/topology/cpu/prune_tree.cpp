// Pruning of grown trees, on the CPU.
//
// One thread owns one request. One selection among the ranks (ranks.h) of all candidates finds the last one that stays;
// then the pool is read once more, in order, and every candidate whose rank is not below gets the next node. The tables
// are made as build_topology makes them (tree_tables.h). 12 bytes per candidate are read, 4 of them twice.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "topology/cpu/entry_points.h"
#include "topology/cpu/ranks.h"
#include "topology/cpu/tree_tables.h"

namespace specdec::cpu {

namespace {

PruneTreeParams request_of(const PruneTreeParams& all, int64_t request) {
  PruneTreeParams p = all;
  const int64_t pool = request * p.size, tree = request * p.nodes;
  p.scores += pool, p.tokens += pool, p.parents += pool, p.expanded += pool;
  p.root_tokens += request;
  p.tree_tokens += tree, p.pool_ids += tree, p.draft_nodes += tree;
  p.node_parents += tree, p.depths += tree, p.ancestors += tree * p.words;
  p.first_child += tree, p.next_sibling += tree;
  p.num_nodes += request, p.status += request;
  return p;
}

// The rank of the last candidate that stays; every other that stays has a greater one.
uint64_t last_rank(const PruneTreeParams& p, std::vector<uint64_t>& ranks) {
  ranks.clear();
  for (int32_t index = 0; index < p.size; ++index) {
    if (p.scores[index] > -INFINITY) ranks.push_back(rank_key(p.scores[index], index));
  }
  const size_t wanted = size_t(p.nodes) - 1;
  if (wanted == 0) return ~uint64_t{0};
  if (ranks.size() <= wanted) return 0;
  std::nth_element(ranks.begin(), ranks.begin() + (wanted - 1), ranks.end(), std::greater<uint64_t>());
  return ranks[wanted - 1];
}

void prune(const PruneTreeParams& p, std::vector<uint64_t>& ranks, std::vector<int32_t>& node_of) {
  const uint64_t last = last_rank(p, ranks);
  node_of.assign(p.size, p.nodes);  // out of range for those that go
  int32_t count = 1;
  p.tree_tokens[0] = *p.root_tokens;
  p.pool_ids[0] = p.node_parents[0] = -1;
  p.draft_nodes[0] = 0;
  for (int32_t index = 0; index < p.size; ++index) {
    if (!(p.scores[index] > -INFINITY) || rank_key(p.scores[index], index) < last) continue;
    node_of[index] = count;
    p.tree_tokens[count] = p.tokens[index];
    p.pool_ids[count] = index;
    p.draft_nodes[count] = p.expanded[index];
    ++count;
  }
  for (int32_t node = 1; node < count; ++node) {
    const int32_t parent = p.parents[p.pool_ids[node]];
    p.node_parents[node] = parent == -1 ? 0 : parent >= 0 && parent < p.size ? node_of[parent] : p.nodes;
  }
  for (int32_t* table : {p.tree_tokens, p.pool_ids, p.draft_nodes}) std::fill(table + count, table + p.nodes, -1);
  *p.status = sound_parents(p.node_parents, p.node_parents, count, p.nodes);
  *p.num_nodes = count;
  depths_and_ancestors(p.node_parents, p.depths, p.ancestors, count, p.nodes, p.words);
  links(p.node_parents, p.first_child, p.next_sibling, count, p.nodes);
}

}  // namespace

}  // namespace specdec::cpu

namespace specdec {

using namespace cpu;

void prune_tree_cpu(const PruneTreeParams& p, int threads) {
  const int pool = threads_for(int64_t{p.batch} * p.size, threads);
#pragma omp parallel num_threads(pool) if (pool > 1)
  {
    std::vector<uint64_t> ranks;
    std::vector<int32_t> node_of;
    ranks.reserve(p.size);
#pragma omp for schedule(static)
    for (int32_t request = 0; request < p.batch; ++request) prune(request_of(p, request), ranks, node_of);
  }
}

}  // namespace specdec

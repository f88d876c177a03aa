// Levels of draft trees, and their pruning, on the CPU.
//
// One thread owns one request. A candidate's rank is one 64-bit number, its score's bits above the complement of its
// index, so "best" is the greatest number and no two are equal: a level's frontier is a partial sort of at most
// rows * branching of them, a pruned tree one selection among all, after which the pool is read once more in order. A
// level reads 8 bytes and writes 16 per candidate, and 24 + 8 * words per node: a few microseconds in all, so small
// batches stay on the calling thread.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "topology/candidate.h"
#include "topology/cpu/entry_points.h"
#include "topology/cpu/tree_tables.h"

namespace specdec::cpu {

namespace {

constexpr int64_t kMinCandidatesPerThread = 4096;  // about 10 us of work, several times the cost of starting a thread

// Greater for the greater score, and among equals for the lower index.
uint64_t rank_key(float score, int32_t index) {
  const float zero_is_one = score + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &zero_is_one, sizeof bits);
  bits ^= bits >> 31 != 0 ? 0xffffffffu : 0x80000000u;
  return uint64_t{bits} << 32 | (0xffffffffu - uint32_t(index));
}
int32_t index_of(uint64_t key) { return int32_t(0xffffffffu - uint32_t(key)); }

int threads_for(int64_t candidates, int threads) {
  return static_cast<int>(std::clamp<int64_t>(candidates / kMinCandidatesPerThread, 1, std::max(threads, 1)));
}

// One request of a call: the parameters with every pointer at the request's first element.
GrowTreeParams request_of(const GrowTreeParams& all, int64_t request) {
  GrowTreeParams p = all;
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

void blank_pool(const GrowTreeParams& p) {
  std::fill_n(p.tokens, p.size, -1);
  std::fill_n(p.scores, p.size, -INFINITY);
  std::fill_n(p.parents, p.size, -1);
  std::fill_n(p.expanded, p.size, -1);
  for (int32_t* table : {p.candidates, p.node_parents, p.first_child, p.next_sibling}) std::fill_n(table, p.nodes, -1);
  std::fill_n(p.depths, p.nodes, 0);
  std::fill_n(p.ancestors, int64_t{p.nodes} * p.words, 0);
  p.ancestors[0] = 1;
  *p.num_nodes = 1;
  *p.status = 0;
}

// Writes the level's candidates and appends the ranks of those that may be expanded.
void take_candidates(const GrowTreeParams& p, bool active, std::vector<uint64_t>& ranks) {
  int32_t status = 0;
  for (int32_t row = 0; row < p.rows; ++row) {
    const int32_t parent = p.level == 0 ? -1 : p.candidates[p.first_parent + row];
    const bool grows = active && (p.level == 0 || (parent >= 0 && parent < p.first_candidate));
    const float above = grows && p.level > 0 ? p.scores[parent] : 0.0f;
    for (int32_t j = 0; j < p.branching; ++j) {
      const int32_t index = row * p.branching + j, place = p.first_candidate + index;
      const Candidate found = candidate_of(p, grows ? p.top_tokens[index] : -1, p.top_logprobs[index], above);
      const bool exists = found.token >= 0;
      status |= found.status;
      p.tokens[place] = found.token;
      p.scores[place] = found.score;
      p.parents[place] = exists ? parent : -1;
      p.expanded[place] = -1;
      if (exists && !ends_text(p, found.token)) ranks.push_back(rank_key(found.score, index));
    }
  }
  *p.status |= status;
}

void write_node(const GrowTreeParams& p, int32_t column, int32_t index) {
  const int32_t row = index / p.branching, place = p.first_candidate + index;
  const int32_t node = p.first_node + column, parent = p.first_parent + row;
  p.frontier_tokens[column] = p.tokens[place];
  p.parent_rows[column] = row;
  p.frontier_scores[column] = p.scores[place];
  p.expanded[place] = node;
  p.candidates[node] = place;
  p.node_parents[node] = parent;
  p.depths[node] = p.level + 1;
  uint64_t* words = p.ancestors + int64_t{node} * p.words;
  std::copy_n(p.ancestors + int64_t{parent} * p.words, p.words, words);
  words[node / 64] |= uint64_t{1} << (node % 64);
}

void write_blank(const GrowTreeParams& p, int32_t column) {
  const int32_t node = p.first_node + column;
  p.frontier_tokens[column] = p.parent_rows[column] = -1;
  p.frontier_scores[column] = -INFINITY;
  p.candidates[node] = p.node_parents[node] = -1;
  p.depths[node] = 0;
  std::fill_n(p.ancestors + int64_t{node} * p.words, p.words, 0);
}

void grow(const GrowTreeParams& p, bool active, std::vector<uint64_t>& ranks) {
  if (p.level == 0) blank_pool(p);
  ranks.clear();
  take_candidates(p, active, ranks);
  const int32_t found = int32_t(std::min<size_t>(p.width, ranks.size()));
  std::partial_sort(ranks.begin(), ranks.begin() + found, ranks.end(), std::greater<uint64_t>());
  for (int32_t column = 0; column < found; ++column) write_node(p, column, index_of(ranks[column]));
  for (int32_t column = found; column < p.width; ++column) write_blank(p, column);
  std::fill_n(p.first_child + p.first_parent, p.rows, -1);
  std::fill_n(p.first_child + p.first_node, p.width, -1);
  std::fill_n(p.next_sibling + p.first_node, p.width, -1);
  for (int32_t column = found - 1; column >= 0; --column) {
    const int32_t node = p.first_node + column;
    int32_t& first = p.first_child[p.node_parents[node]];
    p.next_sibling[node] = first;
    first = node;
  }
  if (found > 0) *p.num_nodes = p.first_node + found;
}

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

void grow_tree_cpu(const GrowTreeParams& p, int threads) {
  const int pool = threads_for(int64_t{p.batch} * p.rows * p.branching, threads);
#pragma omp parallel num_threads(pool) if (pool > 1)
  {
    std::vector<uint64_t> ranks;
    ranks.reserve(size_t(p.rows) * p.branching);
#pragma omp for schedule(static)
    for (int32_t request = 0; request < p.batch; ++request) {
      grow(request_of(p, request), p.active == nullptr || p.active[request] != 0, ranks);
    }
  }
}

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

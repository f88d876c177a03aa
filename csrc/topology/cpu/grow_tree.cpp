// Levels of draft trees, on the CPU.
//
// One thread owns one request. A level's frontier is a partial sort of the ranks (ranks.h) of at most rows * branching
// candidates. A level reads 8 bytes and writes 16 per candidate, and 24 + 8 * words per node: a microsecond or two, so
// small batches stay on the calling thread.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "topology/candidate.h"
#include "topology/cpu/entry_points.h"
#include "topology/cpu/ranks.h"

namespace specdec::cpu {

namespace {

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

}  // namespace specdec

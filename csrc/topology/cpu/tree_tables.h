// Depths, ancestor sets and links of one request's tree, from its parents.
//
// Forwards, a node's ancestor words are its parent's words with its own bit added: parents come first, so they are
// done. Backwards, a node is pushed to the front of its parent's list of children, so every list ends up in ascending
// order without any scratch memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "topology/params.h"

namespace specdec::cpu {

// Writes the sound parents of one request and returns its status; parents_out may be parents. Afterwards every parent is -1 or an earlier node,
// whatever the input was, which is what the passes below rely on to stay inside their arrays.
inline int32_t sound_parents(const int32_t* parents, int32_t* parents_out, int32_t count, int32_t nodes) {
  int32_t status = 0;
  for (int32_t node = 0; node < count; ++node) {
    const int32_t parent = read_once(parents + node);
    const bool out_of_range = parent < -1 || parent >= count;
    const bool not_before = !out_of_range && parent >= node;
    status |= out_of_range ? kParentOutOfRange : 0;
    status |= not_before ? kParentNotBefore : 0;
    parents_out[node] = out_of_range || not_before ? -1 : parent;
  }
  std::fill(parents_out + count, parents_out + nodes, -1);
  return status;
}

inline void depths_and_ancestors(const int32_t* parents, int32_t* depths, uint64_t* ancestors, int32_t count,
                                 int32_t nodes, int32_t words) {
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

inline void links(const int32_t* parents, int32_t* first_child, int32_t* next_sibling, int32_t count, int32_t nodes) {
  std::fill(first_child, first_child + nodes, -1);
  std::fill(next_sibling + count, next_sibling + nodes, -1);
  int32_t first_root = -1;
  for (int32_t node = count - 1; node >= 0; --node) {
    int32_t& first = parents[node] >= 0 ? first_child[parents[node]] : first_root;
    next_sibling[node] = first;
    first = node;
  }
}

}  // namespace specdec::cpu

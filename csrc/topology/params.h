// Plain structs of build_topology, shared by the CPU kernel, the CUDA launcher and the bindings. See common/types.h.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace specdec {

// Bits of the per-request status that build_topology writes. Zero means that the request's tree is sound.
enum TopologyStatus : int32_t {
  kParentOutOfRange = 1,  // a parent below -1, or not below num_nodes
  kParentNotBefore = 2,   // a parent that does not come before its child (this includes every cycle)
  kNumNodesOutOfRange = 4,
};

// Ancestor sets for trees whose parents change every step. Nodes from num_nodes on are blanked: no parent, depth 0,
// no ancestors (not even themselves), no child, no sibling. A node with a bad parent becomes a root and sets a status.
struct BuildTopologyParams {
  const int32_t* parents;    // [batch, nodes], contiguous
  const int32_t* num_nodes;  // [batch]
  int32_t* parents_out;      // [batch, nodes]
  int32_t* depths;           // [batch, nodes]
  uint64_t* ancestors;       // [batch, nodes, words], bit j of word j / 64: node j is an ancestor of, or is, this node
  int32_t* first_child;      // [batch, nodes], lowest child or -1
  int32_t* next_sibling;     // [batch, nodes], next higher node with the same parent or -1; roots are siblings
  int32_t* num_nodes_out;    // [batch], clamped to [0, nodes]
  int32_t* status;           // [batch], TopologyStatus bits
  int32_t batch, nodes, words;
};

}  // namespace specdec

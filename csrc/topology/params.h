// Plain structs of the topology ops, shared by the CPU kernels, the CUDA launchers and the bindings. See
// common/types.h.
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

// Bits of a pool's per-request status. Each was no candidate.
enum GrowStatus : int32_t {
  kLogprobInvalid = 1,   // a logprob of NaN or +inf
  kTokenOutOfRange = 2,  // a token below -1, or no entry of the draft's vocabulary
};

constexpr int32_t kMaxGrowWidth = 256;  // nodes that a level expands

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

// A level of a draft's tree: its rows' most likely tokens go into the pool, and the best of them become the frontier.
//
// The pool has a level's candidates row by row from first_candidate on, -1 and -inf where there is none. The draft's
// nodes lie level by level: rows of this level from first_parent on, columns of the frontier from first_node on; a node
// that does not exist is blank. Level 0 blanks all else that the pool holds.
struct GrowTreeParams {
  const float* top_logprobs;       // [batch, rows, branching]
  const int32_t* top_tokens;       // [batch, rows, branching]
  const uint8_t* active;           // [batch], or nullptr: every request is
  const int32_t* draft_to_target;  // [draft_vocab], or nullptr: tokens are target ids
  int32_t* frontier_tokens;        // [batch, width]
  int32_t* parent_rows;            // [batch, width]
  float* frontier_scores;          // [batch, width]
  int32_t* tokens;                 // [batch, size]
  float* scores;                   // [batch, size]
  int32_t* parents;                // [batch, size], a candidate or -1
  int32_t* expanded;               // [batch, size], a node of the draft or -1
  int32_t* candidates;             // [batch, nodes], the candidate that a node of the draft is, or -1
  int32_t* node_parents;           // [batch, nodes]; the rest is a Topology, see BuildTopologyParams
  int32_t* depths;                 // [batch, nodes]
  uint64_t* ancestors;             // [batch, nodes, words]
  int32_t* first_child;            // [batch, nodes]
  int32_t* next_sibling;           // [batch, nodes]
  int32_t* num_nodes;              // [batch]
  int32_t* status;                 // [batch], GrowStatus bits
  int32_t eos[kMaxEos], eos_count;
  int32_t batch, rows, branching, width, size, nodes, words, draft_vocab;
  int32_t level, first_parent, first_candidate, first_node;
};

// The root and the best nodes - 1 candidates of a pool, in the order of the pool, and the topology of them. Nodes from
// num_nodes on are blank. A node whose parent has not stayed becomes a root and sets a TopologyStatus.
struct PruneTreeParams {
  const float* scores;         // [batch, size]
  const int32_t* tokens;       // [batch, size]
  const int32_t* parents;      // [batch, size]
  const int32_t* expanded;     // [batch, size]
  const int32_t* root_tokens;  // [batch]
  int32_t* tree_tokens;        // [batch, nodes]
  int32_t* pool_ids;           // [batch, nodes]
  int32_t* draft_nodes;        // [batch, nodes]
  int32_t* node_parents;       // [batch, nodes]
  int32_t* depths;             // [batch, nodes]
  uint64_t* ancestors;         // [batch, nodes, words]
  int32_t* first_child;        // [batch, nodes]
  int32_t* next_sibling;       // [batch, nodes]
  int32_t* num_nodes;          // [batch]
  int32_t* status;             // [batch], TopologyStatus bits
  int32_t batch, size, nodes, words;
};

}  // namespace specdec

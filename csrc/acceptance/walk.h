// The acceptance rules, written once for the CPU and CUDA kernels.
//
// A walk decides one request. What it knows of the two models goes through WalkRows (acceptance/walk_rows.h), which
// owns the logits and the threads.
//
// Every rejection rule has one form: after some siblings were rejected the next token's unnormalised distribution at a node is
//     w(x) = max(0, p(x) - sum_i c_i q_i(x)),  0 for the rejected tokens,  N = sum_x w(x),
// with one term for the draft row that proposed the siblings, or one for each sibling that has a row of its own. Only
// rows of nodes that the walk reaches are read; a rejection costs one pass over them. Papers: Leviathan et al.
// 2211.17192 and Chen et al. 2302.01318 (chains), Miao et al. 2305.09781 and Yang et al. 2401.06706 (trees), Sun et al.
// 2403.10444 (blocks), Weng et al. 2505.12398 (traversal), Sun et al. 2310.15141 (k-sequences), Cai et al. 2401.10774
// (typical), Lu et al. 2409.10644 (longest path).
//
// Loops are bounded whatever the links hold: a child comes after its parent and a sibling after its elder one, else it
// is taken as none, and the walks that can meet a node twice let only one parent have it.
#pragma once

#include "acceptance/walk_paths.h"
#include "acceptance/walk_rejection.h"
#include "acceptance/walk_rows.h"
#include "acceptance/walk_target.h"

namespace specdec {

// Decides one request and writes its outputs. The rule must be the same for all threads, and should be for all blocks.
template <class Rows>
SPECDEC_WALK void accept_walk(const AcceptParams& p, int32_t request, Rows& rows, const WalkScratch& scratch) {
  static_assert(WalkRowsCheck<Rows>::kHolds);
  const bool greedy = !(temperature_of(p.target_sampling, request) > 0);
  switch (p.rule) {
    case AcceptRule::kRecursive:
      if (greedy) break;
      return RejectionWalk<Rows>(p, request, rows, scratch).run_recursive();
    case AcceptRule::kTraversal:
      if (greedy) break;
      return RejectionWalk<Rows>(p, request, rows, scratch).run_traversal();
    case AcceptRule::kKseq:
      if (greedy) break;
      return KseqWalk<Rows>(p, request, rows, scratch).run();
    case AcceptRule::kTargetOnly:
      return CoinWalk<Rows>(p, request, rows, scratch).run();
    case AcceptRule::kTypical:
      return PathWalk<Rows>(p, request, rows, scratch).run_typical();
    case AcceptRule::kLongestPath:
      return PathWalk<Rows>(p, request, rows, scratch).run_longest_path();
    case AcceptRule::kGreedy:
    case AcceptRule::kMatch:
      break;
  }
  MatchWalk<Rows>(p, request, rows, scratch).run();  // in one place, for it is inlined
}

}  // namespace specdec

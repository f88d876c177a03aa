// Rules that reject siblings one after the other and remember what that leaves of the target's distribution.
//
// Which sums may be differences, in float32? Those on the target's side: N, and 1 - alpha. A node is left with N, or
// with S + 1 - alpha, in just as large a part of all runs, so an error of 1e-7 in them moves the result's distribution by 1e-7,
// however small they are. What is left of a draft row is another matter: children are drawn without a coin, so a row
// that has lost nearly all of its probability to the first of them is met in nearly all runs, and its later children
// are judged by the rest alone. So that rest is summed wherever a difference would lose bits, and where it is too small
// a number, the row's distribution is stated anew, in proportion to the greatest probability that is left (take_from_draft).
#pragma once

#include "acceptance/walk_base.h"

namespace specdec {

template <class Rows>
class RejectionWalk : WalkBase<Rows> {
  SPECDEC_WALK_NAMES(Rows);

 public:
  // Root to leaf: a child is accepted with probability min(1, (w / N) / q).
  SPECDEC_WALK void run_recursive() {
    WalkState s = start(0, 0, 0);
    write_node(0, 0);
    for (;;) {
      const Candidate candidate = next_candidate(s);
      if (candidate.child < 0) break;
      const float w = weight_of(s, candidate.token);
      if (w > 0 && coin(candidate.child) * candidate.proposal * s.mass < w * s.left) {
        mark_rejected(s, candidate.child, false);
        s = start(candidate.child, s.level + 1, 0);
        write_node(s.level, s.node);
      } else {
        reject(s, candidate, true);
        if (!(s.mass > 0)) s.child = -1;
      }
    }
    finish(s);
  }

  // Leaf to root, in depth-first order: a path is kept as a whole or loses its last node.
  SPECDEC_WALK void run_traversal() {
    clear_marks();
    WalkState s = start(0, 0, 0);
    for (;;) {
      const Candidate candidate = next_candidate(s);
      if (candidate.child >= 0) {
        const float alpha = alpha_of(s, candidate);
        if (alpha > 0) {
          descend(s, candidate, alpha);
        } else {
          remove(s, candidate);
        }
      } else if (s.level == 0 || coin(s.node) < s.alpha) {
        break;
      } else {
        const Candidate leaf = come_back(s);
        remove(s, leaf);
      }
    }
    for (int32_t level = 0; level < s.level; ++level) write_node(level, scratch.states[level].node);
    write_node(s.level, s.node);
    finish(s);
  }

 private:
  // A child to be tested: what its draft gave it (1 where drafts are deterministic), and its own row's distribution, if any.
  struct Candidate {
    int32_t child, token;
    float proposal;
    TokenDistribution edge;
  };

  SPECDEC_WALK bool child_rows() const { return p.draft && p.child_rows; }
  SPECDEC_WALK bool parent_rows() const { return p.draft && !p.child_rows; }

  SPECDEC_WALK WalkState start(int32_t node, int32_t level, int32_t first_term) {
    WalkState s{};
    s.node = node;
    s.level = level;
    s.mass = 1.0f;
    s.left = s.summed = 1.0f;
    s.alpha = 1.0f;
    s.first_term = first_term;
    s.child = own(children_to_try(node, level), node);
    return s;
  }
  SPECDEC_WALK void open(WalkState& s) {
    if (!s.opened) s.target = target_distribution(s.node);
    s.opened = true;
  }

  // The next child that can be tested, or child -1. One that its draft could not have drawn is rejected, and nothing
  // follows from it.
  SPECDEC_WALK Candidate next_candidate(WalkState& s) {
    for (; s.child >= 0; advance(s)) {
      open(s);
      Candidate candidate{s.child, token_of(s.child), 1.0f, TokenDistribution{}};
      if (is_token(candidate.token)) {
        if (child_rows()) {
          candidate.edge = draft_distribution(s.child);
          if (!candidate.edge.valid) continue;
        }
        if (parent_rows() && !s.draft_opened) {
          s.draft = draft_distribution(s.node);
          s.draft_opened = s.draft.valid;
          if (!s.draft_opened) break;
        }
        const Proposal given = proposal(s, candidate);
        candidate.proposal = given.probability;
        if (given.possible) return candidate;
      }
      s.rejected = true;
      status |= kDraftTokenImpossible;
    }
    s.child = -1;
    return {-1, -1, 0.0f, TokenDistribution{}};
  }
  SPECDEC_WALK void advance(WalkState& s) { s.child = own(next_child(s.child), s.node); }
  // Traversal alone can come to a node from a second parent.
  SPECDEC_WALK int32_t own(int32_t child, int32_t node) {
    return p.rule == AcceptRule::kTraversal ? claim(child, node) : child;
  }
  SPECDEC_WALK Proposal proposal(const WalkState& s, const Candidate& candidate) {
    if (!p.draft) return {1.0f, true};
    if (p.child_rows) return rows.draft_proposal(candidate.edge, candidate.child, candidate.token);
    if (!p.replacement && rows.excluded(candidate.token)) return {0.0f, false};  // it was removed from the row
    return rows.draft_proposal(s.draft, s.node, candidate.token);
  }

  // Takes a token that is excluded by now out of the draft's row. left: from it the children are drawn that follow.
  SPECDEC_WALK void take_from_draft(WalkState& s, float proposal) {
    s.left -= proposal;
    if (s.left >= kSafePart * s.summed) return;
    s.left = s.summed = left_of_draft(s);
    if (s.left >= kLeastLeft || s.draft.one_hot) return;
    const float max = rows.greatest_of_draft(s.draft, s.node);
    s.left = s.summed = max > -HUGE_VALF ? 1.0f : 0.0f;
    if (!(max > -HUGE_VALF)) return;
    // exp2 of what is excluded may be infinite from here on. It is looked at nowhere.
    const float ratio = Rows::exp2((max - s.draft.max) * s.draft.scale) * s.draft.inverse_sum;
    s.draft.max = max;
    s.draft.inverse_sum = 1.0f;
    const float sum = left_of_draft(s);
    s.draft.inverse_sum = 1.0f / sum;
    s.factor *= ratio * sum;
  }
  SPECDEC_WALK float left_of_draft(const WalkState& s) {
    Weights w = plain(s.node, s.target);
    w.kind = WeightKind::kDraft;
    w.terms = 1;
    w.first = {s.draft, s.node, 1.0f};
    return rows.pass(w).sum;
  }
  static constexpr float kSafePart = 0.125f;      // a difference of that part of a sum has lost three bits
  static constexpr float kLeastLeft = 0x1p-64f;   // what is 2^-62 of that is still a normal number
  static constexpr float kMaxFactor = 0x1p+120f;  // of a path that is kept with a probability below 2^-50

  SPECDEC_WALK Weights weights_of(const WalkState& s) const {
    Weights w = plain(s.node, s.target);
    if (s.factor > 0) {
      w.terms = 1;
      w.first = {s.draft, s.node, s.factor};
    } else if (s.terms > 0) {
      w.terms = s.terms;
      w.first = scratch.terms[s.first_term];
      w.more = scratch.terms + s.first_term + 1;
    }
    return w;
  }
  SPECDEC_WALK float weight_of(const WalkState& s, int32_t token) {
    if (rows.excluded(token)) return 0.0f;
    float w = rows.target_probability(s.target, s.node, token);
    if (s.factor > 0) w -= s.factor * rows.draft_probability(s.draft, s.node, token);
    for (int32_t i = 0; i < s.terms; ++i) {
      const Term& term = scratch.terms[s.first_term + i];
      w -= term.factor * rows.draft_probability(term.distribution, term.row, token);
    }
    return w > 0 ? w : 0.0f;
  }

  // Rejects the child that s.child is or was: one pass where the new N is not at hand, which runs the residual's draw
  // as well if the walk can only end here.
  SPECDEC_WALK void reject(WalkState& s, const Candidate& candidate, bool ends_here) {
    const float before = s.mass;
    s.rejected = true;
    s.child = candidate.child;
    advance(s);
    if (!(before > 0)) return;
    if (!p.draft) {
      if (rows.excluded(candidate.token)) return;
      s.mass = before - weight_of(s, candidate.token);
    } else if (p.child_rows) {
      rows.sync();
      const float factor = before / s.alpha;
      if (rows.leader()) {
        scratch.terms[s.first_term + s.terms] = {candidate.edge, candidate.child,
                                                 factor < kMaxFactor ? factor : kMaxFactor};
      }
      s.terms++;
    } else {
      const float factor = s.factor + before / (s.alpha * s.left);
      s.factor = factor < kMaxFactor ? factor : kMaxFactor;
    }
    rows.sync();
    rows.exclude(candidate.token);
    rows.sync();
    if (!p.draft && s.mass >= 0x1p-10f) return;  // beyond that, a difference has lost too many bits
    if (parent_rows() && !p.replacement && s.child >= 0) {
      take_from_draft(s, candidate.proposal);
      if (!(s.left > 0)) s.child = -1;
    }
    s.drew = ends_here && s.child < 0;
    const Weights weights = weights_of(s);
    const Pass pass = s.drew ? rows.draw(weights, key(kNoiseResidual, s.node)) : rows.pass(weights);
    s.mass = pass.sum;
    s.winner = pass.winner;
  }

  // The excluded tokens of a node are those of its children before `end` (-1: all) that were rejected and had been
  // possible.
  SPECDEC_WALK void mark_rejected(const WalkState& s, int32_t end, bool excluded) {
    if (!s.rejected) return;
    rows.sync();
    if (child_rows()) {
      for (int32_t i = 0; i < s.terms; ++i) mark(token_of(scratch.terms[s.first_term + i].row), excluded);
    } else if (!p.draft || s.draft_opened) {
      for (int32_t child = unless_padding(first_child(s.node)); child >= 0 && child != end; child = next_child(child)) {
        const int32_t token = token_of(child);
        if (!is_token(token)) continue;
        if (!excluded || !p.draft || rows.draft_proposal(s.draft, s.node, token).possible) mark(token, excluded);
      }
    }
    rows.sync();
  }
  SPECDEC_WALK void mark(int32_t token, bool excluded) {
    if (!is_token(token)) return;  // it was one when it was rejected: somebody writes
    if (excluded) {
      rows.exclude(token);
    } else {
      rows.include(token);
    }
  }

  // Ends the path at a node: with a token from its row, or from what its rejected children left of it.
  SPECDEC_WALK void finish(WalkState& s) {
    int32_t next = -1;
    if (!ends_at(s.node)) {
      open(s);
      if (s.drew && s.winner >= 0) {
        next = s.winner;
      } else {
        next = draw(weights_of(s), key(s.rejected ? kNoiseResidual : kNoiseBonus, s.node));
      }
    }
    mark_rejected(s, -1, false);
    write_end(s.level, next);
  }

  // Traversal

  SPECDEC_WALK float alpha_of(const WalkState& s, const Candidate& candidate) {
    const float w = weight_of(s, candidate.token);
    if (!(w > 0) || !(s.mass > 0)) return 0.0f;
    const float alpha = s.alpha * (w / s.mass) * (s.left / candidate.proposal);
    return alpha < 1.0f ? alpha : 1.0f;
  }
  // alpha after the loss of a child: S / (S + 1 - alpha), S = sum of (alpha p - q)+. That of node 0 stays 1. The loss
  // itself has the probability S + 1 - alpha.
  SPECDEC_WALK void remove(WalkState& s, const Candidate& candidate) {
    const float before = s.mass;
    reject(s, candidate, s.level == 0);
    if (s.level == 0) return;
    const float kept = before > 0 && s.mass > 0 ? s.alpha * s.mass / before : 0.0f;
    s.alpha = kept > 0 ? kept / (kept + (1.0f - s.alpha)) : 0.0f;
  }
  SPECDEC_WALK void descend(WalkState& s, const Candidate& candidate, float alpha) {
    mark_rejected(s, candidate.child, false);
    rows.sync();
    if (rows.leader()) scratch.states[s.level] = s;
    rows.sync();
    s = start(candidate.child, s.level + 1, s.first_term + s.terms);
    s.alpha = alpha;
    s.edge = candidate.edge;
  }
  // From a node back to its parent; returns the node as the parent's candidate.
  SPECDEC_WALK Candidate come_back(WalkState& s) {
    mark_rejected(s, -1, false);
    const int32_t token = token_of(s.node);  // read once more, and so looked at once more
    Candidate leaf{s.node, is_token(token) ? token : 0, 1.0f, s.edge};
    s = scratch.states[s.level - 1];
    rows.sync();  // before the state is written again
    mark_rejected(s, leaf.child, true);
    leaf.proposal = proposal(s, leaf).probability;
    return leaf;
  }
};

}  // namespace specdec

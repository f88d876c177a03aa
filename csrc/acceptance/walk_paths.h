// Lossy rules that test every node below an accepted one and keep the deepest path. Nodes are visited level by level,
// in a list that grows while it is read.
#pragma once

#include "acceptance/walk_base.h"

namespace specdec {

template <class Rows>
class PathWalk : WalkBase<Rows> {
  SPECDEC_WALK_NAMES(Rows);

 public:
  // p(x) > min(epsilon, delta * exp(-entropy)) on the whole path.
  SPECDEC_WALK void run_typical() {
    clear_marks();
    reach(0, kRoot, 0, 0.0f);
    for (int32_t node = 0; node >= 0; node = scratch.marks[node].next) {
      const PathMark mark = scratch.marks[node];
      const int32_t first = claim_children(node, children_to_try(node, mark.depth));
      if (first < 0) continue;
      const TokenDistribution distribution = target_distribution(node, true);
      const float threshold = typical_threshold(distribution);
      for (int32_t child = first; is_child(child, node); child = next_child(child)) {
        const int32_t token = token_of(child);
        if (!is_token(token)) {
          status |= kDraftTokenImpossible;
          continue;
        }
        const float probability = rows.target_probability(distribution, node, token);
        if (probability > threshold) reach(child, node, mark.depth + 1, mark.score + Rows::log(probability));
      }
    }
    const int32_t end = deepest(), level = scratch.marks[end].depth;
    for (int32_t node = end, i = level; i >= 0; node = scratch.marks[node].parent, --i) write_node(i, node);
    int32_t next = -1;
    if (!ends_at(end)) {
      Weights weights = plain(end, target_distribution(end, true));
      weights.kind = WeightKind::kThreshold;
      weights.threshold = typical_threshold(weights.target);
      next = draw(weights, key(kNoiseBonus, end));
    }
    write_end(level, next);
  }

  // The roots, node 0 and its siblings, are given. Every other node has a coin of its own against p / q of its parent.
  // -1 ends the list of roots as it ends one of children, and a root that is no token is left out, node 0 excepted.
  SPECDEC_WALK void run_longest_path() {
    clear_marks();
    for (int32_t root = 0; root >= 0; root = next_child(root)) {
      const bool possible = is_token(token_of(root));
      if (!possible && token_of(root) != -1) status |= kDraftTokenImpossible;
      if (possible || root == 0) reach(root, kRoot, 0, 0.0f);
    }
    for (int32_t node = 0; node >= 0; node = scratch.marks[node].next) {
      const int32_t depth = scratch.marks[node].depth;
      const int32_t first = claim_children(node, ends_text(token_of(node)) ? -1 : children_to_try(node, depth));
      if (first < 0) continue;
      const TokenDistribution target = target_distribution(node);
      TokenDistribution draft{};
      bool opened = greedy || !p.draft;
      for (int32_t child = first; is_child(child, node); child = next_child(child)) {
        if (!is_token(token_of(child))) {
          status |= kDraftTokenImpossible;
          continue;
        }
        if (!opened) {
          draft = draft_distribution(node);
          if (!draft.valid) break;
          opened = true;
        }
        if (passes_alone(node, child, target, draft)) reach(child, node, depth + 1, 0.0f);
      }
    }
    write_longest_path(deepest());
  }

 private:
  // Takes hold of all children of a node; returns the first, or -1.
  SPECDEC_WALK int32_t claim_children(int32_t node, int32_t first) {
    first = claim(first, node);
    for (int32_t child = first; child >= 0;) child = claim(next_child(child), node);
    return first;
  }
  SPECDEC_WALK bool is_child(int32_t child, int32_t node) const {
    return child >= 0 && scratch.marks[child].parent == node;
  }
  // Appends a node to the list. `last` is the same in all threads.
  SPECDEC_WALK void reach(int32_t node, int32_t parent, int32_t depth, float score) {
    rows.sync();
    if (rows.leader()) {
      scratch.marks[node] = {parent, depth, -1, score};
      if (last >= 0) scratch.marks[last].next = node;
    }
    last = node;
    rows.sync();
  }
  int32_t last = -1;

  // The deepest node, then the one of the greatest score, then the lowest.
  SPECDEC_WALK int32_t deepest() const {
    int32_t best = 0;
    for (int32_t node = 1; node < num_nodes; ++node) {
      const PathMark mark = scratch.marks[node], other = scratch.marks[best];
      if (mark.depth > other.depth || (mark.depth == other.depth && mark.score > other.score)) best = node;
    }
    return best;
  }
  SPECDEC_WALK float typical_threshold(const TokenDistribution& distribution) const {
    const float bound = p.thresholds[1] * Rows::exp(-distribution.entropy);
    return bound < p.thresholds[0] ? bound : p.thresholds[0];
  }
  SPECDEC_WALK bool passes_alone(int32_t node, int32_t child, const TokenDistribution& target,
                                 const TokenDistribution& draft) {
    const int32_t token = token_of(child);
    if (!is_token(token)) return false;
    const float probability = rows.target_probability(target, node, token);
    const Proposal proposal = greedy || !p.draft ? Proposal{1.0f, true} : rows.draft_proposal(draft, node, token);
    if (!proposal.possible) status |= kDraftTokenImpossible;
    return proposal.possible && probability > 0 && coin(child) * proposal.probability < probability;
  }
  SPECDEC_WALK void write_longest_path(int32_t end) {
    const int32_t level = scratch.marks[end].depth;
    if (rows.leader()) {
      for (int32_t node = end, i = level; i >= 0; node = scratch.marks[node].parent, --i) {
        p.path[output_row() + i] = node;
        p.tokens[output_row() + i] = token_of(node);
      }
      for (int32_t i = level + 1; i <= p.max_depth; ++i) p.tokens[output_row() + i] = p.path[output_row() + i] = -1;
      p.num_accepted[request] = level + 1;
      p.finished[request] = ends_text(token_of(end));
    }
    write_next_tokens(end, level, p.next_tokens + int64_t(request) * p.width);
    if (rows.leader()) p.status[request] = status;
  }
  // `width` tokens without replacement: from p - q if children of the end were rejected, else from p.
  SPECDEC_WALK void write_next_tokens(int32_t end, int32_t level, int32_t* next) {
    if (ends_text(token_of(end))) {
      if (rows.leader())
        for (int32_t i = 0; i < p.width; ++i) next[i] = -1;
      return;
    }
    Weights weights = plain(end, target_distribution(end));
    if (greedy && weights.target.valid) return rows.top_logits(end, p.width, next);
    NoiseDomain domain = kNoiseBonus;
    if (level > 0 && p.draft && !greedy && children_to_try(end, level) >= 0) {
      const TokenDistribution draft = draft_distribution(end);
      if (draft.valid) {
        domain = kNoiseResidual;
        weights.terms = 1;
        weights.first = {draft, end, 1.0f};
        if (!(rows.pass(weights).sum > 0)) {
          status |= kResidualEmpty;
          weights.terms = 0;
        }
      }
    }
    rows.draw_top(weights, key(domain, end), p.width, next);
  }
};

}  // namespace specdec

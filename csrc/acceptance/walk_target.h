// Rules that look at the target first: matching its own draw, one coin against the mass of the children, and K drafts
// against a scaled ratio. None of them changes a row's distribution on the way.
#pragma once

#include "acceptance/walk_base.h"

namespace specdec {

// Greedy, and sampling as without drafts: descends into the lowest child that has the drawn token.
template <class Rows>
class MatchWalk : WalkBase<Rows> {
  SPECDEC_WALK_NAMES(Rows);

 public:
  SPECDEC_WALK void run() {
    int32_t node = 0, level = 0, next = -1;
    write_node(0, 0);
    for (;;) {
      next = drawn_token(node, level);
      int32_t child = children_to_try(node, level);
      for (; child >= 0; child = next_child(child)) {
        const int32_t token = token_of(child);
        if (!is_token(token)) {  // not even where an id of the target is none either
          status |= kDraftTokenImpossible;
        } else if (token == next) {
          break;
        }
      }
      if (child < 0) break;
      node = child;
      write_node(++level, node);
      if (ends_text(next)) {
        next = -1;
        break;
      }
    }
    write_end(level, next);
  }

 private:
  SPECDEC_WALK int32_t drawn_token(int32_t node, int32_t level) {
    if (p.target_is_ids) {
      const int32_t* ids = static_cast<const int32_t*>(p.target);
      return ids[request * p.target_stride_batch + node * p.target_stride_node];
    }
    const TokenDistribution distribution = target_distribution(node);
    if (distribution.one_hot) return distribution.argmax;
    const uint32_t at = uint32_t(position) + uint32_t(level) + 1;  // wraps around
    return draw(plain(node, distribution), noise_key(seed, int32_t(at), kNoiseSample, 0));
  }
};

// One coin for all children of a node, against the mass of those tried so far. Repeats are skipped. The next token is
// drawn from the weights of the others themselves: what the mass leaves of 1 is asked by the coin alone.
template <class Rows>
class CoinWalk : WalkBase<Rows> {
  SPECDEC_WALK_NAMES(Rows);

 public:
  SPECDEC_WALK void run() {
    int32_t node = 0, level = 0;
    bool rejected = false;
    TokenDistribution distribution{};
    write_node(0, 0);
    for (;;) {
      const int32_t first = children_to_try(node, level);
      rejected = false;
      if (!ends_at(node)) distribution = target_distribution(node);
      const int32_t child = first < 0 ? -1 : accepted(node, first, distribution, rejected);
      if (child < 0) break;
      clear_tried(node, child, rejected);
      node = child;
      write_node(++level, node);
    }
    int32_t next = -1;
    if (!ends_at(node)) next = draw(plain(node, distribution), key(rejected ? kNoiseResidual : kNoiseBonus, node));
    clear_tried(node, -1, rejected);
    write_end(level, next);
  }

 private:
  SPECDEC_WALK int32_t accepted(int32_t node, int32_t child, const TokenDistribution& distribution, bool& rejected) {
    const float u = coin_of(key(kNoiseAccept, 1), node);
    float sum = 0.0f;
    for (; child >= 0; child = next_child(child)) {
      const int32_t token = token_of(child);
      if (!is_token(token)) {
        status |= kDraftTokenImpossible;
      } else if (!rows.excluded(token)) {
        const float probability = rows.target_probability(distribution, node, token);
        sum += probability;
        if (probability > 0 && (u * p.thresholds[1] < sum || probability >= p.thresholds[0])) return child;
        rows.sync();
        rows.exclude(token);
        rows.sync();
      }
      rejected = true;
    }
    return -1;
  }
  // Of the children before `end`, or of all.
  SPECDEC_WALK void clear_tried(int32_t node, int32_t end, bool rejected) {
    if (!rejected) return;
    rows.sync();
    for (int32_t child = unless_padding(first_child(node)); child >= 0 && child != end; child = next_child(child)) {
      const int32_t token = token_of(child);
      if (is_token(token)) rows.include(token);
    }
    rows.sync();
  }
};

// K siblings drawn with replacement, each accepted with probability min(1, p / (rho q)).
template <class Rows>
class KseqWalk : WalkBase<Rows> {
  SPECDEC_WALK_NAMES(Rows);

 public:
  SPECDEC_WALK void run() {
    int32_t node = 0, level = 0;
    Level at{};
    write_node(0, 0);
    for (;;) {
      at = Level{};
      const int32_t first = children_to_try(node, level);
      if (!ends_at(node)) at.target = target_distribution(node);
      const int32_t child = first < 0 ? -1 : accepted(node, first, at);
      if (child < 0) break;
      node = child;
      write_node(++level, node);
    }
    int32_t next = -1;
    if (!ends_at(node)) {
      Weights weights = plain(node, at.target);
      if (at.opened) {
        weights.kind = WeightKind::kKseq;
        weights.terms = 1;
        weights.first = {at.draft, node, 1.0f};
        weights.gain = at.gain;
        weights.rho = at.rho;
      }
      next = draw(weights, key(at.rejected ? kNoiseResidual : kNoiseBonus, node));
    }
    write_end(level, next);
  }

 private:
  struct Level {
    TokenDistribution target, draft;
    float rho, gain;
    bool opened, rejected;
  };
  static constexpr int kMaxPasses = 12;  // 36 bisections: fp32 is exhausted long before

  SPECDEC_WALK int32_t accepted(int32_t node, int32_t first, Level& at) {
    for (int32_t child = first; child >= 0; child = next_child(child)) {
      const int32_t token = token_of(child);
      if (is_token(token)) {
        if (!at.opened) {
          at.draft = draft_distribution(node);
          if (!at.draft.valid) return -1;
          at.opened = true;
          find_rho(node, first, at);
        }
        const Proposal proposal = rows.draft_proposal(at.draft, node, token);
        const float probability = rows.target_probability(at.target, node, token);
        if (!proposal.possible) {
          status |= kDraftTokenImpossible;
        } else if (probability > 0 && coin(child) * at.rho * proposal.probability < probability) {
          return child;
        }
      } else {
        status |= kDraftTokenImpossible;
      }
      at.rejected = true;
    }
    return -1;
  }

  // rho: the upper end of a bracket, 2^-12 wide, of the root of 1 - (1 - beta)^K = rho * beta, where beta = sum of
  // min(q, p / rho). Every rho from the root on is exact with the gain that belongs to it.
  SPECDEC_WALK void find_rho(int32_t node, int32_t first, Level& at) {
    float draws = 0.0f;
    for (int32_t child = first; child >= 0; child = next_child(child)) draws += 1.0f;
    float low = 1.0f, high = draws, beta_at_high = -1.0f;
    at.rho = at.gain = 1.0f;
    if (draws <= 1.0f) return;
    for (int pass = 0; pass < kMaxPasses && is_wide(low, high); ++pass) {
      const float from = low, step = (high - low) * (1.0f / (kRhoPoints + 1));
      const RhoSums sums = rows.rho_sums(node, at.target, at.draft, from, step);
      uint32_t enough = 0;  // bit i: point i is at or above the root
      for (int i = 0; i < kRhoPoints; ++i) {
        const float rho = from + float(i + 1) * step, beta = beta_of(sums.sum[i], rho);
        enough |= reached(beta, draws) <= rho * beta ? 1u << i : 0u;
      }
      int below = 0, above = kRhoPoints + 1;
      while (above - below > 1 && is_wide(low, high)) {
        const int middle = (below + above) / 2;
        if (enough >> (middle - 1) & 1u) {
          above = middle;
          high = from + float(middle) * step;
        } else {
          below = middle;
          low = from + float(middle) * step;
        }
      }
      for (int i = 0; i < kRhoPoints; ++i) beta_at_high = i + 1 == above ? beta_of(sums.sum[i], high) : beta_at_high;
    }
    at.rho = high;
    if (beta_at_high < 0) beta_at_high = beta_of(rows.rho_sums(node, at.target, at.draft, high, 0.0f).sum[0], high);
    at.gain = beta_at_high > 0 ? reached(beta_at_high, draws) / beta_at_high : draws;
  }
  SPECDEC_WALK static bool is_wide(float low, float high) { return high - low > low * 0x1p-12f; }
  SPECDEC_WALK static float beta_of(float sum, float rho) {
    const float beta = sum / rho;
    return beta < 1.0f ? beta : 1.0f;
  }
  SPECDEC_WALK static float reached(float beta, float draws) { return -Rows::expm1(draws * Rows::log1p(-beta)); }
};

}  // namespace specdec

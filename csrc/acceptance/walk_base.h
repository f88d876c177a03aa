// What all acceptance rules share: rows as distributions, the tree, noise, results. See walk.h.
#pragma once

#include "acceptance/params.h"
#include "common/philox.h"

#if defined(__CUDACC__)
#define SPECDEC_WALK __device__ __forceinline__
#else
#define SPECDEC_WALK inline
#endif

namespace specdec {

constexpr int32_t kEveryId = 0x7fffffff;

SPECDEC_WALK bool is_eos(const AcceptParams& p, int32_t token) {
  for (int32_t i = 0; i < p.eos_count; ++i)
    if (p.eos[i] == token) return true;
  return false;
}

// The distribution of one row: weight exp2((z - max) * scale) of every kept id, z > cut or (z == cut and id <= cut_id),
// times inverse_sum. Ids are the row's own: draft ids for a row of a reduced vocabulary.
struct TokenDistribution {
  float max, scale,
      inverse_sum;  // max: the greatest logit, of a distribution that was stated anew of those not excluded
  float cut;
  int32_t cut_id;
  int32_t argmax;  // the lowest of equals; for an invalid row the id that stands for it
  bool one_hot;    // everything on argmax: temperature 0, or an invalid row
  bool valid;
  float entropy;  // natural, over the kept ids; computed when asked for, and 0 if one_hot
};

// c * q, q the distribution of a draft row.
struct Term {
  TokenDistribution distribution;
  int32_t row;
  float factor;
};

enum class WeightKind : int32_t {
  kResidual,   // max(0, p - sum of terms); without terms p itself
  kKseq,       // max(0, p - gain * min(q, p / rho)), q of `first`
  kThreshold,  // p where p > threshold, else 0
  kDraft,      // q of `first`, which belongs to a row of the draft; p is not asked for
};

// Weights over the target's vocabulary at one node. `terms` counts `first` as well. Excluded tokens have no weight,
// unless `with_excluded`.
struct Weights {
  WeightKind kind;
  int32_t node;
  TokenDistribution target;
  int32_t terms;
  Term first;
  const Term* more;
  float gain, rho, threshold;
  bool with_excluded;
};

// What a draft row gives a token. One that is possible may have a probability too small for a float.
struct Proposal {
  float probability;
  bool possible;
};

struct Pass {
  float sum;
  int32_t winner;  // of the draw, if one was asked for; -1 if no weight is above 0
};

// sum of min(p, rho * q) at several rho. Seven points at once are three steps of bisection.
constexpr int kRhoPoints = 7;
struct RhoSums {
  float sum[kRhoPoints];
};

// A node whose children are being tried.
struct WalkState {
  int32_t node, child, level;
  bool opened, draft_opened;  // whether `target` and `draft` have been read
  bool rejected;              // whether a child was
  bool drew;                  // whether the last pass ran the residual's draw
  int32_t winner;             // of it
  TokenDistribution target;   // of the node's row
  TokenDistribution draft;    // parent rows: of the node's draft row
  TokenDistribution edge;     // child rows: of the draft row that proposed this node
  float mass;                 // N
  float left;                 // parent rows, without replacement: sum of q over the tokens that are not excluded
  float summed;               // the same when it was summed last: below that, differences have been taken
  float factor;               // parent rows: c of the one term
  int32_t first_term, terms;  // child rows: of WalkScratch::terms
  float alpha;                // traversal: the weight of the path down to the node
};

// What a walk over whole trees knows of a node.
struct PathMark {
  int32_t parent;  // kNoParent, kRoot or a node
  int32_t depth;   // -1: not reached
  int32_t next;    // node reached after this one, or -1
  float score;
};
constexpr int32_t kNoParent = -1, kRoot = -2;

// Memory of one request. walk_needs says which arrays a call needs.
struct WalkScratch {
  WalkState* states;  // [max_depth + 1]
  Term* terms;        // [nodes]
  PathMark* marks;    // [nodes]
};
struct WalkNeeds {
  bool states, terms, marks;
};
SPECDEC_HOST_DEVICE WalkNeeds walk_needs(const AcceptParams& p) {
  const bool traversal = p.rule == AcceptRule::kTraversal;
  return {traversal, p.draft != nullptr && p.child_rows,
          traversal || p.rule == AcceptRule::kTypical || p.rule == AcceptRule::kLongestPath};
}

template <class Rows>
class WalkBase {
 public:
  SPECDEC_WALK WalkBase(const AcceptParams& params, int32_t request, Rows& rows, const WalkScratch& scratch)
      : p(params), rows(rows), scratch(scratch), request(request) {
    const int32_t asked = read_once(p.num_nodes + request * p.num_nodes_stride_batch);
    num_nodes = asked < 1 ? 1 : asked > p.nodes ? p.nodes : asked;
    if (asked != num_nodes) status |= kTreeInvalid;
    seed = value_of(p.seed, request);
    position = value_of(p.position, request);
    greedy = p.rule == AcceptRule::kGreedy || !(temperature_of(p.target_sampling, request) > 0);
    status |= setting_status(p.target_sampling, request);
    if (p.draft && !greedy) status |= setting_status(p.draft_sampling, request);
  }

 protected:
  const AcceptParams& p;
  Rows& rows;
  const WalkScratch scratch;
  const int32_t request;
  int32_t num_nodes, position;
  int64_t seed;
  int32_t status = 0;
  bool greedy;  // temperature 0: drafts are not read, and no coin is needed

  // The tree

  // A sound link leads on. Beyond num_nodes, but inside of the arrays, it is that of a tree of which a part was taken.
  SPECDEC_WALK int32_t link(int32_t to, int32_t from) {
    if (to == -1) return -1;
    if (to > from && to < p.nodes) return to < num_nodes ? to : -1;
    status |= kTreeInvalid;
    return -1;
  }
  SPECDEC_WALK int32_t first_child(int32_t node) {
    if (!p.first_child) return node + 1 < num_nodes ? node + 1 : -1;
    return link(read_once(p.first_child + request * p.links_stride_batch + node), node);
  }
  SPECDEC_WALK int32_t next_sibling(int32_t node) {
    return p.first_child ? link(read_once(p.next_sibling + request * p.links_stride_batch + node), node) : -1;
  }
  SPECDEC_WALK int32_t token_of(int32_t node) const {
    return read_once(p.draft_tokens + request * p.draft_tokens_stride_batch + node - p.first_token_node);
  }
  // -1 pads the children of a node: it ends them.
  SPECDEC_WALK int32_t unless_padding(int32_t node) const { return node >= 0 && token_of(node) != -1 ? node : -1; }
  SPECDEC_WALK int32_t next_child(int32_t child) { return unless_padding(next_sibling(child)); }
  SPECDEC_WALK bool is_token(int32_t token) const { return token >= 0 && (p.target_is_ids || token < p.vocab); }
  SPECDEC_WALK bool ends_text(int32_t token) const { return is_eos(p, token); }
  // Whether the sequence ends with a node. The token of node 0 is committed: where it is a root of a forest, see there.
  SPECDEC_WALK bool ends_at(int32_t node) const { return node > 0 && ends_text(token_of(node)); }
  SPECDEC_WALK int32_t children_to_try(int32_t node, int32_t level) {
    return level >= p.max_depth || ends_at(node) ? -1 : unless_padding(first_child(node));
  }

  // Noise

  SPECDEC_WALK NoiseKey key(NoiseDomain domain, int32_t detail) const {
    return noise_key(seed, position, domain, uint32_t(detail));
  }
  SPECDEC_WALK float coin(int32_t node) const { return coin_of(key(kNoiseAccept, 0), node); }

  // Rows

  SPECDEC_WALK TokenDistribution target_distribution(int32_t node, bool with_entropy = false) {
    const TokenDistribution distribution = rows.target_distribution(node, with_entropy);
    if (!distribution.valid) status |= kTargetInvalid;
    return distribution;
  }
  SPECDEC_WALK TokenDistribution draft_distribution(int32_t row) {
    const TokenDistribution distribution = rows.draft_distribution(row);
    if (!distribution.valid) status |= kDraftInvalid;
    return distribution;
  }
  SPECDEC_WALK static Weights plain(int32_t node, const TokenDistribution& target) {
    Weights w{};
    w.kind = WeightKind::kResidual;
    w.node = node;
    w.target = target;
    return w;
  }
  // Draws from the weights. If rounding left nothing of them: from p, if possible without the excluded tokens.
  SPECDEC_WALK int32_t draw(const Weights& weights, const NoiseKey& noise) {
    Pass pass = rows.draw(weights, noise);
    if (pass.winner >= 0) return pass.winner;
    status |= kResidualEmpty;
    Weights all = plain(weights.node, weights.target);
    pass = rows.draw(all, noise);
    if (pass.winner >= 0) return pass.winner;
    all.with_excluded = true;
    return rows.draw(all, noise).winner;
  }

  // Results

  SPECDEC_WALK int64_t output_row() const { return int64_t(request) * (p.max_depth + 1); }
  SPECDEC_WALK void write_node(int32_t level, int32_t node) {
    if (!rows.leader()) return;
    p.path[output_row() + level] = node;
    if (level > 0) p.tokens[output_row() + level - 1] = token_of(node);
  }
  // The path ends at `level`; next is -1 after the end of a sequence.
  SPECDEC_WALK void write_end(int32_t level, int32_t next) {
    if (!rows.leader()) return;
    p.num_accepted[request] = level;
    p.next_tokens[request] = next;
    p.finished[request] = ends_text(next) || (level > 0 && ends_text(p.tokens[output_row() + level - 1]));
    p.tokens[output_row() + level] = next;
    for (int32_t i = level + 1; i <= p.max_depth; ++i) p.tokens[output_row() + i] = p.path[output_row() + i] = -1;
    p.status[request] = status;
  }

  // Marks: which parent reached a node. A second parent is a malformed tree.

  SPECDEC_WALK void clear_marks() {
    rows.sync();
    if (rows.leader())
      for (int32_t i = 0; i < num_nodes; ++i) scratch.marks[i] = {kNoParent, -1, -1, 0.0f};
    rows.sync();
  }
  // The child, which is the parent's from now on; -1 if it already is another node's.
  SPECDEC_WALK int32_t claim(int32_t child, int32_t parent) {
    if (child < 0) return -1;
    const int32_t owner = scratch.marks[child].parent;
    rows.sync();
    if (owner != kNoParent && owner != parent) {
      status |= kTreeInvalid;
      return -1;
    }
    if (rows.leader()) scratch.marks[child].parent = parent;
    rows.sync();
    return child;
  }
};

// The names of WalkBase, which a class template that derives from it does not see by itself.
#define SPECDEC_WALK_NAMES(Rows)                                                                           \
  using Base = WalkBase<Rows>;                                                                             \
  using Base::p, Base::rows, Base::scratch, Base::request, Base::num_nodes, Base::position, Base::seed;    \
  using Base::status, Base::greedy, Base::link, Base::first_child, Base::next_sibling, Base::token_of;     \
  using Base::unless_padding, Base::next_child, Base::is_token, Base::ends_text, Base::ends_at;            \
  using Base::children_to_try, Base::key, Base::coin, Base::target_distribution, Base::draft_distribution, \
      Base::plain, Base::draw;                                                                             \
  using Base::output_row, Base::write_node, Base::write_end, Base::clear_marks, Base::claim;               \
  using Base::Base

}  // namespace specdec

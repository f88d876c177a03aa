// Acceptance on CPUs: the rules are in acceptance/walk.h, the passes over rows in acceptance/cpu/row_passes.h.
//
// With at least as many requests as threads, a thread owns a request from its first row to its last. With fewer, the
// requests go one after the other and the threads share each row, chunk by chunk. Either way a request's result is the
// same. A row is read from memory once, when its distribution is made; its exponentials are kept for the passes that follow,
// which are over the last rows of target and draft, or over those of the path where a walk goes back on it. Scratch: a
// thread holds one bit and eight bytes per token (traversal up to 64) and, by rule, states of one request's nodes;
// filters hold eight bytes per token more.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "acceptance/cpu/entry_points.h"
#include "acceptance/cpu/row_reader.h"
#include "acceptance/walk.h"
#include "common/cpu/thread_pool.h"

namespace specdec::cpu {
namespace {

constexpr int kKeptOfPath = 8;  // rows on whose path traversal goes back; the others never do
constexpr int kFewTerms = 3;    // up to these are gone through in each pass

// Scratch of one thread's requests.
struct Workspace {
  std::vector<WalkState> states;
  std::vector<Term> terms;
  std::vector<PathMark> marks;
  std::vector<DistributionRow> rows;
  std::vector<uint64_t> excluded;
  std::vector<KeptRow> kept_target, kept_draft;  // of node i, or row i, at i % size
  std::vector<FoldedTerms> folded;               // the same
  RowReader reader;

  Workspace(const AcceptParams& p, int threads) : reader(threads) {
    kept_target.resize(p.rule == AcceptRule::kTraversal ? kKeptOfPath : 1);
    kept_draft.resize(kept_target.size());
    folded.resize(kept_target.size());
    const WalkNeeds needs = walk_needs(p);
    if (needs.states) states.resize(p.max_depth + 1);
    if (needs.terms) terms.resize(p.nodes), rows.resize(p.nodes);
    if (needs.marks) marks.resize(p.nodes);
    excluded.assign((int64_t(p.vocab) + 63) / 64, 0);
  }
  WalkScratch scratch() { return {states.data(), terms.data(), marks.data()}; }
};

class CpuRows {
 public:
  CpuRows(const AcceptParams& params, int32_t request, Workspace& workspace)
      : p(params), w(workspace), request(request) {
    target_settings = settings_of(p.target_sampling, request);
    draft_settings = settings_of(p.draft_sampling, request);
    if (p.rule == AcceptRule::kGreedy) target_settings.temperature = 0.0f;
  }

  TokenDistribution target_distribution(int32_t node, bool with_entropy) {
    return w.reader.distribution(target_row(node), p.target_dtype, p.vocab, target_settings, with_entropy,
                                 &kept(w.kept_target, node));
  }
  TokenDistribution draft_distribution(int32_t row) {
    return w.reader.distribution(draft_row(row), p.draft_dtype, p.draft_vocab, draft_settings, false,
                                 &kept(w.kept_draft, row));
  }
  float target_probability(const TokenDistribution& distribution, int32_t node, int32_t token) const {
    return probability(distribution, target_row(node), p.target_dtype, token);
  }
  float draft_probability(const TokenDistribution& distribution, int32_t row, int32_t token) const {
    return draft_proposal(distribution, row, token).probability;
  }
  Proposal draft_proposal(const TokenDistribution& distribution, int32_t row, int32_t token) const {
    const int32_t id = p.target_to_draft ? read_once(p.target_to_draft + token) : token;
    if (id < 0 || id >= p.draft_vocab) return {0.0f, false};
    if (distribution.one_hot) return {id == distribution.argmax ? 1.0f : 0.0f, id == distribution.argmax};
    const float z = logit_at(draft_row(row), p.draft_dtype, id);
    if (!is_kept(distribution, z, id)) return {0.0f, false};
    return {std::exp2((z - distribution.max) * distribution.scale) * distribution.inverse_sum,
            z > -std::numeric_limits<float>::infinity()};
  }
  float greatest_of_draft(const TokenDistribution& distribution, int32_t row) {
    return w.reader.greatest_left(distribution_row_of_draft({distribution, row, 1.0f}), p.vocab, w.excluded.data());
  }

  void exclude(int32_t token) { w.excluded[token / 64] |= uint64_t(1) << (token % 64); }
  void include(int32_t token) { w.excluded[token / 64] &= ~(uint64_t(1) << (token % 64)); }
  bool excluded(int32_t token) const { return w.excluded[token / 64] >> (token % 64) & 1; }

  Pass pass(const Weights& weights) { return run(weights, nullptr); }
  Pass draw(const Weights& weights, const NoiseKey& noise) { return run(weights, &noise); }
  void draw_top(const Weights& weights, const NoiseKey& noise, int32_t count, int32_t* out) {
    WeightPass pass = pass_of(weights, &noise);
    w.reader.draw_top(pass, p.vocab, count, out);
  }
  void top_logits(int32_t node, int32_t count, int32_t* out) {
    w.reader.top_logits(target_row(node), p.target_dtype, p.vocab, count, out);
  }
  RhoSums rho_sums(int32_t node, const TokenDistribution& target, const TokenDistribution& draft, float from,
                   float step) {
    return w.reader.rho_sums(distribution_row_of_target(node, target), distribution_row_of_draft({draft, node, 1.0f}),
                             from, step, p.vocab);
  }

  bool leader() const { return true; }
  void sync() const {}
  static float log(float x) { return std::log(x); }
  static float exp(float x) { return std::exp(x); }
  static float exp2(float x) { return std::exp2(x); }
  static float log1p(float x) { return std::log1p(x); }
  static float expm1(float x) { return std::expm1(x); }

 private:
  const AcceptParams& p;
  Workspace& w;
  int32_t request;
  RowSettings target_settings, draft_settings;

  static KeptRow& kept(std::vector<KeptRow>& rows, int32_t index) { return rows[index % rows.size()]; }
  const void* target_row(int32_t node) const {
    return row_at(p.target, p.target_dtype, request * p.target_stride_batch + node * p.target_stride_node);
  }
  const void* draft_row(int32_t row) const {
    return row_at(p.draft, p.draft_dtype, request * p.draft_stride_batch + row * p.draft_stride_row);
  }
  static float probability(const TokenDistribution& distribution, const void* row, DType dtype, int32_t id) {
    if (distribution.one_hot) return id == distribution.argmax ? 1.0f : 0.0f;
    const float z = logit_at(row, dtype, id);
    return is_kept(distribution, z, id)
               ? std::exp2((z - distribution.max) * distribution.scale) * distribution.inverse_sum
               : 0.0f;
  }
  static bool is_kept(const TokenDistribution& distribution, float z, int32_t id) {
    return z > distribution.cut || (z == distribution.cut && id <= distribution.cut_id);
  }

  DistributionRow distribution_row_of_target(int32_t node, const TokenDistribution& distribution) const {
    return kept(w.kept_target, node)
        .distribution_row(target_row(node), p.target_dtype, nullptr, p.vocab, distribution, 1.0f);
  }
  DistributionRow distribution_row_of_draft(const Term& term) const {
    return kept(w.kept_draft, term.row)
        .distribution_row(draft_row(term.row), p.draft_dtype, p.target_to_draft, p.draft_vocab, term.distribution,
                          term.factor);
  }
  const Term& term_of(const Weights& weights, int32_t i) const { return i == 0 ? weights.first : weights.more[i - 1]; }

  // Terms [begin, end) of the weights.
  void set_terms(WeightPass& pass, const Weights& weights, int32_t begin, int32_t end) {
    pass.terms = end - begin;
    if (begin < end) pass.first = distribution_row_of_draft(term_of(weights, begin));
    for (int32_t i = begin + 1; i < end; ++i) w.rows[i - begin - 1] = distribution_row_of_draft(term_of(weights, i));
    pass.more = w.rows.data();
  }
  // Sets target and terms of the pass. Of many terms all but the last are folded into the target: a node's terms only
  // ever become more.
  void set_rows(WeightPass& pass, const Weights& weights) {
    pass.target = distribution_row_of_target(weights.node, weights.target);
    if (weights.terms <= kFewTerms) return set_terms(pass, weights, 0, weights.terms);
    FoldedTerms& folded = w.folded[weights.node % w.folded.size()];
    if (folded.left == nullptr) {
      folded.left.reset(new float[(int64_t(p.vocab) + kGroup - 1) / kGroup * kGroup]);
      const int64_t blocks = (int64_t(p.vocab) + kSumBlock - 1) / kSumBlock;
      folded.scales.reset(new float[blocks]);
      std::fill_n(folded.scales.get(), blocks, 1.0f);
    }
    const int32_t last = weights.terms - 1;
    if (folded.request != request || folded.node != weights.node || folded.terms > last) folded.terms = 0;
    WeightPass step{};
    step.target = pass.target;
    pass.target.weights = folded.left.get(), pass.target.scales = folded.scales.get();
    if (folded.terms > 0) step.target = pass.target;
    set_terms(step, weights, folded.terms, last);
    if (step.terms > 0) w.reader.fold(step, p.vocab, folded.left.get());
    folded.request = request, folded.node = weights.node, folded.terms = last;
    set_terms(pass, weights, last, weights.terms);
    pass.folded = true;
  }
  WeightPass pass_of(const Weights& weights, const NoiseKey* noise) {
    WeightPass pass{};
    pass.kind = weights.kind;
    set_rows(pass, weights);
    pass.gain = weights.gain;
    pass.rho = weights.rho;
    pass.threshold = weights.threshold;
    pass.excluded = weights.with_excluded ? nullptr : w.excluded.data();
    pass.noisy = true;
    if (noise) pass.noise = *noise;
    return pass;
  }
  Pass run(const Weights& weights, const NoiseKey* noise) {
    WeightPass pass = pass_of(weights, noise);
    return w.reader.weigh(pass, p.vocab, noise != nullptr);
  }
};

void accept_one(const AcceptParams& p, int32_t request, Workspace& workspace) {
  CpuRows rows(p, request, workspace);
  accept_walk(p, request, rows, workspace.scratch());
}

}  // namespace

}  // namespace specdec::cpu

namespace specdec {

using namespace cpu;

void accept_cpu(const AcceptParams& p, int threads) {
  threads = threads_for(double(p.batch) * p.vocab, kTokensPerThread, threads);
  if (p.batch < threads || threads == 1) {
    Workspace workspace(p, threads);
    for (int32_t request = 0; request < p.batch; ++request) accept_one(p, request, workspace);
    return;
  }
  Shares requests(p.batch);
  run_team(
      threads,
      [&](int) {
        Workspace workspace(p, 1);
        requests.take([&](int64_t request) { accept_one(p, int32_t(request), workspace); });
      },
      Parts::kUneven);
}

}  // namespace specdec

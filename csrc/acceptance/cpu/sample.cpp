// Sampling on CPUs: the distribution of a row, then one draw over it. With at least as many rows as threads a thread owns a row,
// else the threads share each row, chunk by chunk.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "acceptance/cpu/entry_points.h"
#include "acceptance/cpu/row_reader.h"
#include "common/cpu/thread_pool.h"

namespace specdec::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

class RowSampler {
 public:
  RowSampler(const SampleParams& params, int32_t request, int32_t row, RowReader& reader, KeptRow& kept)
      : p(params), reader(reader), kept(kept), request(request), row(row) {
    const int64_t place = int64_t(request) * p.rows + row;
    logits = row_at(p.logits, p.dtype, request * p.logits_stride_batch + row * p.logits_stride_row);
    tokens = p.tokens + place * p.count;
    logprobs = p.logprobs ? p.logprobs + place * p.count : nullptr;
    logsumexp = p.logsumexp ? p.logsumexp + place : nullptr;
    settings = settings_of(p.sampling, request);
  }

  // Returns the row's status.
  int32_t run() {
    const bool drafting = p.domain == SampleDomain::kDraft;
    const TokenDistribution distribution = reader.distribution(logits, p.dtype, p.vocab, settings, false, &kept);
    int drawn = 0;
    if (distribution.valid || !drafting) drawn = draw(distribution);
    std::fill(tokens + drawn, tokens + p.count, -1);
    if (logprobs || logsumexp) describe(distribution, distribution.valid || !drafting ? drawn : -1);
    if (p.draft_to_target)
      for (int i = 0; i < drawn; ++i) tokens[i] = p.draft_to_target[tokens[i]];
    return distribution.valid ? 0 : drafting ? kDraftInvalid : kTargetInvalid;
  }

 private:
  const SampleParams& p;
  RowReader& reader;
  KeptRow& kept;
  int32_t request, row;
  const void* logits;
  int32_t* tokens;
  float *logprobs, *logsumexp;
  RowSettings settings;

  NoiseKey noise(uint32_t draw) const {
    const int64_t seed = value_of(p.seed, request);
    const int32_t position = value_of(p.position, request);
    if (p.domain == SampleDomain::kSample) return noise_key(seed, position, kNoiseSample, 0);
    const int32_t parent = p.parents ? p.parents[int64_t(request) * p.rows + row] : p.first_parent + row;
    return noise_key(seed, position, kNoiseDraft, uint32_t(parent) + (draw << 16));
  }

  // Writes ids of the row; returns how many there are.
  int draw(const TokenDistribution& distribution) {
    if (distribution.one_hot && (p.replacement || !distribution.valid || p.count == 1)) {
      const int drawn = p.replacement ? p.count : 1;
      std::fill(tokens, tokens + drawn, distribution.argmax);
      return drawn;
    }
    if (distribution.one_hot) return reader.top_logits(logits, p.dtype, p.vocab, p.count, tokens);
    WeightPass pass{};
    pass.target = kept.distribution_row(logits, p.dtype, nullptr, p.vocab, distribution, 1.0f);
    pass.noise = noise(0);
    if (!p.replacement && p.count > 1) return reader.draw_top(pass, p.vocab, p.count, tokens);
    for (int32_t i = 0; i < p.count; ++i) {
      pass.noise = noise(uint32_t(i));
      tokens[i] = reader.weigh(pass, p.vocab, true).winner;
    }
    return p.count;
  }

  // Natural logarithms of q, for the tokens while they are still ids of the row. At temperature 0, where it would say
  // nothing, of temperature 1 without filters. drawn -1: there is no distribution.
  void describe(TokenDistribution distribution, int drawn) {
    if (distribution.valid && distribution.one_hot)
      distribution = reader.distribution(logits, p.dtype, p.vocab, {1.0f, 0, 1.0f}, false);
    const double temperature = settings.temperature > 0 ? settings.temperature : 1.0;
    const double total = distribution.max / temperature - std::log(double(distribution.inverse_sum));
    if (logsumexp) *logsumexp = drawn < 0 ? -kInfinity : float(total);
    if (!logprobs) return;
    for (int32_t i = 0; i < p.count; ++i) {
      const double scaled = i < drawn ? logit_at(logits, p.dtype, tokens[i]) / temperature : 0.0;
      logprobs[i] = i < drawn ? float(scaled - total) : -kInfinity;
    }
  }
};

}  // namespace

}  // namespace specdec::cpu

namespace specdec {

using namespace cpu;

void sample_cpu(const SampleParams& p, int threads) {
  const int64_t rows = int64_t(p.batch) * p.rows;
  threads = threads_for(double(rows) * p.vocab, kTokensPerThread, threads);
  for (int32_t request = 0; request < p.batch; ++request) p.status[request] = setting_status(p.sampling, request);
  const auto sample_row = [&](int64_t place, RowReader& reader, KeptRow& kept) {
    const int32_t request = int32_t(place / p.rows);
    const int32_t status = RowSampler(p, request, int32_t(place % p.rows), reader, kept).run();
    if (status) __atomic_fetch_or(p.status + request, status, __ATOMIC_RELAXED);
  };
  if (rows < threads || threads == 1) {
    RowReader reader(threads);
    KeptRow kept;
    for (int64_t place = 0; place < rows; ++place) sample_row(place, reader, kept);
    return;
  }
  Shares shares(rows);
  run_team(threads, [&](int) {
    RowReader reader(1);
    KeptRow kept;
    shares.take([&](int64_t place) { sample_row(place, reader, kept); });
  });
}

}  // namespace specdec

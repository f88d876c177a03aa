// Rows of logits as distributions, and draws over them, on a pool of threads.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "acceptance/cpu/row_kernels.h"
#include "common/cpu/thread_pool.h"

namespace specdec::cpu {

constexpr double kTokensPerThread = 1 << 14;  // of a call's rows: below this many another thread does not pay

struct RowSettings {
  float temperature;
  int32_t top_k;
  float top_p;
};
RowSettings settings_of(const SamplingParams& params, int32_t request);

const void* row_at(const void* base, DType dtype, int64_t element);
float logit_at(const void* row, DType dtype, int64_t place);

// The weights of the row that was scanned last, for the passes that follow: they cost a load each in place of an
// exponential.
struct KeptRow {
  const void* row = nullptr;
  float max, inverse_sum;  // of the distribution that the weights are of: a walk may state a row's distribution anew
  std::unique_ptr<float[]> weights, scales;  // of every entry, and of every kSumBlock of them: see DistributionRow

  DistributionRow distribution_row(const void* of, DType dtype, const int32_t* map, int32_t entries,
                                   const TokenDistribution& distribution, float factor) const {
    const bool has = row == of && !map && distribution.max == max && distribution.inverse_sum == inverse_sum;
    return {of, dtype, map, entries, distribution, factor, has ? weights.get() : nullptr, has ? scales.get() : nullptr};
  }
};

// What is left of a node's row of the target after the first `terms` terms. So each of many terms, one for every sibling
// with a row of its own, is read once and not again in each later pass.
struct FoldedTerms {
  int32_t request = -1, node = -1, terms = 0;
  std::unique_ptr<float[]> left, scales;  // scales are 1: see DistributionRow
};

// Scratch and threads; one for each row that is worked on at a time.
class RowReader {
 public:
  explicit RowReader(int threads) : kernels_(row_kernels()), pool_(threads) {}

  // One pass over the row; filters add passes (see top_k_top_p.cpp). `keep` gets its weights; nothing where a filter,
  // temperature 0 or the entropy is asked for, and where they are too many.
  TokenDistribution distribution(const void* row, DType dtype, int64_t size, const RowSettings& settings,
                                 bool with_entropy, KeptRow* keep = nullptr);

  // Sum of the weights of `vocab` tokens and, with a draw, its winner or -1.
  Pass weigh(WeightPass& pass, int64_t vocab, bool draw);

  // Writes what the terms leave of p, also below 0.
  void fold(const WeightPass& pass, int64_t vocab, float* left);

  // The best `count` of a draw, then -1. Returns how many there are. From p alone every possible token can come,
  // however unlikely it is next to those before it. From a residual those come whose score float32 can hold, or if
  // there are none, the greatest weights.
  int draw_top(WeightPass& pass, int64_t vocab, int count, int32_t* out);

  // The greatest entry that the distribution keeps, of tokens that are not excluded; -inf if there is none.
  float greatest_left(const DistributionRow& row, int64_t vocab, const uint64_t* excluded);

  // The greatest logits above -inf.
  int top_logits(const void* row, DType dtype, int64_t size, int count, int32_t* out);

  RhoSums rho_sums(const DistributionRow& target, const DistributionRow& draft, float from, float step, int64_t vocab);

 private:
  struct View {
    const void* row;
    DType dtype;
    int64_t size;
  };
  struct Kept {
    Cut cut;
    double mass;
  };

  int best_of_draw(const WeightPass& pass, int64_t vocab, int count, float least, int32_t* out);
  ScanPart scan(const View& view, ScanKind kind, float scale, KeptRow* keep);
  Kept filter(const View& row, const RowSettings& settings, const TokenDistribution& distribution, double mass);
  Cut narrow(const View& view, ScanKind kind, double target, const TokenDistribution& distribution, double* reached);
  Cut last_of(const View& view, float low, float high, ScanKind kind, double target, double above,
              const TokenDistribution& distribution, double* reached);
  void sums_above(const View& view, ScanKind kind, const TokenDistribution& distribution, const float* thresholds,
                  double* sums);
  int64_t collect(const View& view, float threshold, std::vector<float>& values, std::vector<int32_t>& places);
  ScanPart kept(const View& view, const TokenDistribution& distribution, const Cut& cut);

  const RowKernels& kernels_;
  ThreadPool pool_;
  std::vector<ScanPart> parts_;
  std::vector<float> sums_;
  std::vector<float> top_values_, values_;  // collected entries: those of top-k, and those around a cut
  std::vector<int32_t> top_places_, places_;
  std::vector<int64_t> counts_;
  std::vector<uint64_t> order_, drawn_;
};

}  // namespace specdec::cpu

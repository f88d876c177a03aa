// Bounded abort on the CPU: the head is read a part at a time, by the rows that are still open.
//
// Behind each part a row's statistics are written from what it has seen, and early_exit/bound_verdict.h says whether any entry
// that is left could change its decision or what it returns. The ceiling of the unread logits is the row's length times
// the greatest length of an unread entry (Cauchy and Schwarz), plus the greatest bias among them. Parts are read as
// exit_confidence reads the head: a row that sees all of a head whose parts end at multiples of kExitChunk has its very
// statistics. Memory read: the parts that some row needed, the rows and their bounds.
//
// Rounding, all of it outward. A product of n = dim numbers is summed in chains of at most n / 4 + 24 roundings, plus a
// handful of scales, so it is at most (n / 4 + 64) 2^-24 |y| |W_v| above the exact one; numbers that a dot product of
// bfloat16 takes for zero cost less than 2^-125 (sqrt(n) (|y| + |W_v|) + n), see screened_exit.cpp.
#include "early_exit/bound_verdict.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>

#include "early_exit/cpu/head_reader.h"

namespace specdec::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kOutward = 1 + 1e-6;  // for the rounding of the bound itself

RowReach reach_of(const ExitParams& p, const ProductForm& form, int row) {
  std::vector<float> y(float_row(p.dim));
  product_kernels().normalise(hidden_rows(p), row, y.data());
  round_row(form, y);
  const RowLength of_row = row_length(form, y, p.dim);
  const double length = of_row.whole + of_row.rounding, sums = (p.dim / 4.0 + 64) * 0x1p-24;
  const double vanishing = std::sqrt(double(p.dim)) * 0x1p-125;
  return {(length * (1 + sums) + vanishing) * kOutward, (vanishing * length + p.dim * 0x1p-125) * kOutward};
}

// The greatest bias behind each part, NaN if there is a NaN; 0 without a bias, -inf behind the last part.
std::vector<float> biases_after(const BoundedParams& b) {
  std::vector<float> after(b.parts, b.exit.bias ? -kInfinity : 0.0f);
  for (int part = b.parts - 1; b.exit.bias && part > 0; part--) {
    float most = after[part];
    for (int32_t entry = b.ends[part - 1]; entry < b.ends[part]; entry++) {
      const float bias = b.exit.bias[entry];
      if (bias > most || std::isnan(bias)) most = bias;
    }
    after[part - 1] = most;
  }
  return after;
}

SeenPart seen_part(const ExitParams& p, int row, const ExitState& state) {
  return {state.sum,
          -double(state.weighted_logit_sum) / temperature_of(p, row),
          state.value[0],
          state.value[1],
          state.value[std::max(p.top_k, 1) - 1],
          state.invalid || setting_status(p, row) != 0};
}

// The rows of `open` whose decisions are not certain.
std::vector<int> still_open(const BoundedParams& b, const std::vector<int>& open, int part,
                            const std::vector<RowReach>& reach, float bias, const std::vector<ExitState>& states) {
  const ExitParams& p = b.exit;
  std::vector<int> left;
  VerdictCounts counts{};
  for (int row : open) {
    const float ceiling = ceiling_of(reach[row], b.norms_after[part], bias);
    const float limit = p.thresholds ? p.thresholds[row] : p.threshold;
    const ExitVerdict verdict = exit_verdict(seen_part(p, row, states[row]), ceiling, p.vocab - b.ends[part],
                                             temperature_of(p, row), p.measure, limit);
    if (p.level != ExitLevel::kRow || !row_settled(verdict)) left.push_back(row);
    counts.no += verdict.no;
    counts.yes += verdict.yes;
    counts.known += verdict.known;
  }
  if (p.level != ExitLevel::kRow && level_settled(counts, p.level, p.rows)) left.clear();
  return left;
}

}  // namespace

}  // namespace specdec::cpu

namespace specdec {

using namespace cpu;

void bounded_exit_cpu(const BoundedParams& b, int threads) {
  const ExitParams& p = b.exit;
  const ThreadPool pool = exit_threads(p, threads);
  const ProductForm form = head_form(p.head_type, p.hidden_dtype != DType::kFloat32);
  std::vector<RowReach> reach(p.rows);
  pool.run(p.rows, [&](int64_t row, int) { reach[row] = reach_of(p, form, int(row)); });
  const std::vector<float> biases = biases_after(b);
  std::vector<ExitState> states(p.rows, empty_exit_state());
  std::vector<int> open(p.rows);
  std::iota(open.begin(), open.end(), 0);
  std::unique_ptr<HeadReader> reader;
  for (int part = 0, begin = 0; part < b.parts && !open.empty(); begin = b.ends[part++]) {
    if (!reader || reader->rows() != open) reader = std::make_unique<HeadReader>(p, open, pool);
    reader->read(begin, b.ends[part], states);
    for (int row : open) {
      write_stats(p, row, states[row]);
      b.seen[row] = b.ends[part];
    }
    if (part + 1 < b.parts) open = still_open(b, open, part, reach, biases[part], states);
  }
  decide_exits(p);
}

}  // namespace specdec

// Bounded abort: what is known of a row's exit while only a part of the head has been read. CPU and GPU alike.
//
// Let S be the sum of exp((z - m) / T) over the entries seen, m their greatest logit, and U a ceiling that none of the
// `left` others can pass. Put s = (z - m) / T, u = (U - m) / T, R = left * exp(u). Then, whatever those others are:
//   max_prob   at most 1 / S, or with u > 0 also exp(u) / (S + exp(u)): S only grows. At least 1 / (S + R) if u <= 0.
//   margin     likewise, with 1 - exp(second) or exp(u) - 1 above the line.
//   entropy    H of the entries seen, mixed with something of weight a <= R / (S + R) = A: h(a) + (1 - a) H at least,
//              which is concave in a, so least at one of its ends; h(a) + (1 - a) H + a log(left) at most, which is
//              log(exp(H) + left) where that a is in reach, and at A where it is not.
// A row is `no` if it cannot pass, `yes` if it must; `known` if no other entry can be among those that are returned.
// Once no row is open, reading may end. kRoom is for the rounding of float sums, here and in exit_confidence.
#pragma once

#include <cmath>

#include "early_exit/params.h"

#if defined(__CUDACC__)
#define SPECDEC_BOUND __device__ inline
#else
#define SPECDEC_BOUND inline
#endif

namespace specdec {

// What a row has seen. Logits are before the temperature.
struct SeenPart {
  double sum;    // of exp((z - max) / T), at least 1
  double fall;   // of the same times (max - z) / T
  float max;     // the greatest logit
  float second;  // the second one, or -inf
  float least;   // the last one that is returned: the greatest itself, or the last of the top_k; -inf if there is none
  bool invalid;  // NaN or +inf among them, or no temperature
};

struct ExitVerdict {
  bool no, yes, known;
};

// h(a) + (1 - a) * entropy
SPECDEC_BOUND double mixed_entropy(double a, double entropy) {
  const double choice = a > 0 && a < 1 ? -a * log(a) - (1 - a) * log1p(-a) : 0.0;
  return choice + (1 - a) * entropy;
}

// `ceiling` is U, infinite or NaN where nothing is known. `left` is at least 1. A `limit` of NaN decides nothing.
SPECDEC_BOUND ExitVerdict exit_verdict(const SeenPart& seen, float ceiling, double left, double temperature,
                                       ExitMeasure measure, float limit) {
  constexpr double kRoom = 1e-4;      // relative
  constexpr double kLeadRoom = 1e-6;  // of the difference of two probabilities
  constexpr double kMaxAbove = 600;   // exp of which times any vocabulary is finite
  if (seen.invalid) return {true, false, true};
  if (!(seen.sum > 0)) return {false, false, false};
  const double u = (double(ceiling) - seen.max) / temperature, peak = exp(u);
  if (!(u <= kMaxAbove)) return {false, false, false};
  const bool above = u > 0;
  const double rest = left * peak, all = seen.sum + rest;
  double low, high;
  if (measure == ExitMeasure::kEntropy) {
    const double entropy = log(seen.sum) + seen.fall / seen.sum, most = rest / all;
    const double turn = left / (left + exp(entropy));  // where the upper bound is greatest
    low = fmin(entropy, mixed_entropy(most, entropy));
    high = turn <= most ? log(exp(entropy) + left) : mixed_entropy(most, entropy) + most * log(left);
    const double room = 2 * kRoom * (1 + high);
    return {low - room > limit, high + room <= limit, ceiling <= seen.least};
  }
  const double gap = (double(seen.second) - seen.max) / temperature;
  if (measure == ExitMeasure::kMargin) {
    const double lead = -expm1(gap), least_lead = -expm1(fmax(gap, u));
    high = fmax(lead / seen.sum, above ? (peak - 1) / (seen.sum + peak) : 0.0) + kLeadRoom;
    low = (above ? 0.0 : least_lead / all) - kLeadRoom;
  } else {
    high = fmax(1 / seen.sum, above ? peak / (seen.sum + peak) : 0.0);
    low = above ? 0.0 : 1 / all;
  }
  return {high * (1 + kRoom) < limit, low * (1 - kRoom) >= limit, ceiling <= seen.least};
}

// Whether a row that has seen a part needs no more, at ExitLevel::kRow. At the other levels all rows read on until one
// decision for all is certain, see level_settled.
SPECDEC_BOUND bool row_settled(const ExitVerdict& verdict) { return verdict.no || (verdict.yes && verdict.known); }

// No product of a row with an entry of length w is computed to be above by_length * w + floor.
struct RowReach {
  double by_length, floor;
};

// What no unread logit is above: `norm` is not below the length of an unread entry, `bias` the greatest of theirs, NaN
// if there is a NaN. Infinite where a sum on the way to it might overflow.
SPECDEC_BOUND float ceiling_of(const RowReach& reach, float norm, float bias) {
  constexpr double kGreatest = 1e30;  // of a product of lengths, and of a row's, which int8 heads meet unscaled
  const double product = reach.by_length * norm + reach.floor, highest = product + bias;
  if (!(product < kGreatest && reach.by_length < kGreatest)) return INFINITY;
  const double outward = 0x1p-20 * fabs(highest);
  return float(outward < INFINITY ? highest + outward : highest);
}

// Counts of verdicts over all rows of a call.
struct VerdictCounts {
  int32_t no, yes, known;
};

// Whether the decision for all rows is certain, and what they return if they exit.
SPECDEC_BOUND bool level_settled(const VerdictCounts& counts, ExitLevel level, int32_t rows) {
  const bool exits = counts.known == rows && (level == ExitLevel::kAny ? counts.yes > 0 : counts.yes == rows);
  return exits || (level == ExitLevel::kAny ? counts.no == rows : counts.no > 0);
}

}  // namespace specdec

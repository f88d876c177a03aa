// Screened heads: what is known of a row's statistics when only some of its logits are known. CPU and GPU alike.
//
// An int8 copy of the head gives an approximation of every logit. Some entries are rechecked in full precision, and
// their logits are known. The others are the tail: each of their true logits lies within a bound of its approximation.
//
// The bound. Let y be a row as exit_confidence multiplies it, r what is multiplied with the copy (y itself, or y in 16
// bits), W_v = s_v q_v + E_v an entry of the head. Then exactly
//     W_v y = s_v q_v r + s_v q_v (y - r) + E_v y,
// where |E_v y| <= |E_v| |y| and |s_v q_v (y - r)| <= norms[v] |y - r| (Cauchy and Schwarz). Both products round n =
// dim sums, plus a handful of scales and the bias. How far that may lead depends on the order of a kernel's sums, so
// each kernel derives its own ScreenBound, and rounds it outward.
//
// The sum. Let s = (approximation - reference) / T and w = exp(s) of an entry in the tail, whose true s is off by d
// with |d| <= e. Two intervals hold the sum of exp(true s):
//   (1) each entry by itself: from the sum of exp(s - e) to that of exp(s + e).
//   (2) all together: d = E y / T + noise, and |E y| as a vector over all entries is at most gain |y|, where gain, the
//       spectral norm of E, is a small part of what its rows could do one by one. As 1 + x <= exp(x) <= 1 + x + c x^2
//       for |x| <= X, c = (exp(X) - 1 - X) / X^2, the sum is off by at most |w| B below and |w| B + c max(w) B^2 above,
//       B = gain |y| / T, times exp(noise).
// The sum of exp(true s) * -(true s), which the entropy needs, goes likewise. The narrower end of each holds.
//
// The statistics. max_prob = 1 / S, where S is the sum of exp((z - first) / T) over all entries and `first` the
// greatest logit. margin = max_prob * (1 - exp((second - first) / T)). entropy = log(S) + F / S, where F is the sum of
// exp((z - first) / T) * (first - z) / T. All rise or fall with S and F, so intervals of these give theirs.
// kFloatRoom covers the float32 sums of the tail and those of exit_confidence.
//
// triton_kernels/early_exit/screen_stats.py has the same in Triton; a test compares the two.
#pragma once

#include <cmath>

#include "common/philox.h"
#include "early_exit/params.h"

namespace specdec {

// How far logit v of one hidden row may lie from its approximation a:
// by_error * error_norms[v] + by_norm * norms[v] + floor + kScreenRounding * |a|.
struct ScreenBound {
  float by_error, by_norm, floor;
};
constexpr float kScreenRounding = 0x1p-21f;  // what adding the bias may lose, of the approximation

constexpr float kLowestLogit = -1e30f;      // masked logits count as this: lower ones would make NaN of differences
constexpr double kGreatestProduct = 1e30;   // of two lengths: above it a sum might overflow
constexpr double kFloatRoom = 1e-4;         // relative, of sums in float32
constexpr double kBoundOutward = 1 + 1e-6;  // for the rounding of a bound itself

// The tail: what the entries that are not rechecked may add to the sum of exp((z - reference) / T). With s, w and e as
// above:
struct ScreenTail {
  double upper, lower;  // sums of exp(s + e) and of exp(s - e)
  double weight;        // sum of w
  double squares;       // of w^2
  double peak;          // greatest w
  double error;         // greatest e
  double noise;         // greatest part of an e that is not by_error's
  double upper_fall;    // not below the sum of exp(true s) * -(true s)
  double lower_fall;    // not above it
  double fall;          // sum of w * -s
  double turn_squares;  // sum of (w * (1 + s))^2
  double peak_fall;     // greatest w * -s
};

// Rechecked logits, or what stands for them: the greatest two, the sum of exp((z - first) / T), and of the same times
// (first - z) / T.
struct KnownLogits {
  float first, second;
  double sum, fall;
};

SPECDEC_HOST_DEVICE double smaller(double a, double b) { return b < a ? b : a; }
SPECDEC_HOST_DEVICE double larger(double a, double b) { return a < b ? b : a; }

struct Interval {
  double low, high;
};
SPECDEC_HOST_DEVICE Interval operator*(Interval a, double positive) { return {a.low * positive, a.high * positive}; }
SPECDEC_HOST_DEVICE Interval operator+(Interval a, Interval b) { return {a.low + b.low, a.high + b.high}; }
SPECDEC_HOST_DEVICE Interval operator+(Interval a, double number) { return {a.low + number, a.high + number}; }
SPECDEC_HOST_DEVICE Interval intersection(Interval a, Interval b) {
  return {larger(a.low, b.low), smaller(a.high, b.high)};
}
SPECDEC_HOST_DEVICE double nearest(Interval a, double number) { return smaller(larger(number, a.low), a.high); }

// A statistic as it is returned, and where that of the whole head lies.
struct BoundedStat {
  double value;
  Interval bounds;
};
struct BoundedStats {
  BoundedStat max_prob, margin, entropy;
};

// exp(x) <= 1 + x + this * x^2 for |x| <= most.
SPECDEC_HOST_DEVICE double exp_curvature(double most) {
  return most < 1e-3 ? 0.501 : (expm1(most) - most) / (most * most) * kBoundOutward;
}

// The two sums of the tail: of exp(true s), and of exp(true s) * -(true s).
struct TailIntervals {
  Interval sum, fall;
};

// `spread` is B above.
SPECDEC_HOST_DEVICE TailIntervals tail_intervals(const ScreenTail& tail, double spread) {
  constexpr double kMaxOfEach = 300;     // an error up to which (1) is of use for the falls
  constexpr double kMaxTogether = 20.0;  // and (2) for both: exp of more is no bound worth having
  TailIntervals of = {{tail.lower, tail.upper}, {0.0, INFINITY}};
  if (tail.error < kMaxOfEach) of.fall = {tail.lower_fall, tail.upper_fall};
  if (!(tail.error < kMaxTogether)) return of;
  const double off = sqrt(tail.squares) * spread;
  const double more = exp_curvature(tail.error) * tail.peak * spread * spread;
  of.sum = intersection(of.sum, {(tail.weight - off) * exp(-tail.noise), (tail.weight + off + more) * exp(tail.noise)});
  const double turned = sqrt(tail.turn_squares) * spread + tail.noise * (tail.weight + tail.fall);
  const double bent = (tail.peak_fall + (tail.error + 2) * tail.peak) * spread * spread +
                      (tail.fall + (tail.error + 2) * tail.weight) * tail.noise * tail.noise;
  const double off_fall = turned + exp(tail.error) * bent;
  of.fall = intersection(of.fall, {tail.fall - off_fall, tail.fall + off_fall});
  return of;
}

// The statistics of a row: each from the approximations of the tail, moved into the interval that is certain.
SPECDEC_HOST_DEVICE BoundedStats bounded_stats(const KnownLogits& known, const ScreenTail& tail, float reference,
                                               double temperature, double spread) {
  const double first = known.first, second = known.second;
  const TailIntervals rest = tail_intervals(tail, spread);
  // The tail is measured from the reference, which lies `gap` below the first. So far below that scale is 0, it adds
  // nothing; its falls may be infinite, and 0 times infinity must not get into a sum.
  const double gap = (first - reference) / temperature, scale = exp(-gap);
  const Interval all = rest.sum * scale + known.sum;
  Interval all_fall = {known.fall, known.fall};
  double size_fall = known.fall;
  if (scale > 0) {
    all_fall = (rest.fall + rest.sum * gap) * scale + known.fall;
    size_fall = known.fall + (tail.fall + gap * tail.weight) * scale;
  }
  const double lead = -expm1((second - first) / temperature);
  const double size = known.sum + tail.weight * scale;
  const Interval max_prob = {(1 - kFloatRoom) / all.high, (1 + kFloatRoom) / all.low};
  const double highest = log(all.high) + all_fall.high / all.low, room = 2 * kFloatRoom * (1 + highest);
  const Interval entropy = {larger(0.0, log(all.low) + all_fall.low / all.high - room), highest + room};
  const double value = smaller(1.0, nearest(max_prob, 1 / size));
  return {
      {value, max_prob}, {value * lead, max_prob * lead}, {nearest(entropy, log(size) + size_fall / size), entropy}};
}

SPECDEC_HOST_DEVICE bool within_tolerance(const BoundedStat& of, float tolerance) {
  return of.bounds.high - of.value <= tolerance && of.value - of.bounds.low <= tolerance;
}

// Whether no entry of the tail can change the decision, and the statistics are as near as the caller wants them.
SPECDEC_HOST_DEVICE bool is_settled(const BoundedStats& stats, ExitMeasure measure, float threshold, float tolerance) {
  if (!within_tolerance(stats.max_prob, tolerance) || !within_tolerance(stats.margin, tolerance)) return false;
  const Interval bounds = measure == ExitMeasure::kEntropy  ? stats.entropy.bounds
                          : measure == ExitMeasure::kMargin ? stats.margin.bounds
                                                            : stats.max_prob.bounds;
  return measure == ExitMeasure::kNone || bounds.low > threshold || bounds.high < threshold;
}

}  // namespace specdec

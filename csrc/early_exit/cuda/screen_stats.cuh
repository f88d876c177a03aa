// The screened head's arithmetic on a GPU: how far an approximate logit may be off, what entries that are not rechecked
// may add to the sums of a softmax, and bounds of the statistics. See csrc/early_exit/cpu/screened_exit.cpp for why
// they hold.
#pragma once

#include "common/cuda/device.cuh"
#include "early_exit/cuda/exit_state.cuh"
#include "early_exit/params.h"

namespace specdec::cuda {

constexpr float kLowestLogit = -1e30f;     // masked logits: lower ones would make NaN of differences
constexpr float kGreatestProduct = 1e30f;  // of lengths: above it a sum might overflow
constexpr double kFloatRoom = 1e-4;        // relative: for float sums here and in exit_confidence
constexpr double kBoundOutward = 1 + 1e-6;

// |logit - approximation| <= by_error * error_norm + by_norm * norm + floor + 2^-21 * |approximation|.
struct ScreenBound {
  float by_error, by_norm, floor;
};
struct ScreenError {
  float noise, all;  // the part that is not by_error's, and all of it
};
__device__ __forceinline__ ScreenError screen_error(const ScreenBound& bound, float approximate, float error_norm,
                                                    float norm) {
  const float noise = 0x1p-21f * fabsf(approximate) + (bound.by_norm * norm + bound.floor);
  return {noise, bound.by_error * error_norm + noise};
}

// With approximations s = (a - reference) / T, weights w = exp(s), and bounds e of what s may be wrong by:
struct TailSums {
  float upper, lower;  // of exp(s + e) and of exp(s - e)
  float weight;        // of w
  float squares;       // of w^2
  float upper_fall;    // not below the sum of exp(true s) * -(true s)
  float lower_fall;    // not above it
  float fall;          // of w * -s
  float turn_squares;  // of (w * (1 + s))^2
};
struct TailMost {
  float peak;       // w
  float error;      // e
  float noise;      // the part of an e that is not by_error's
  float peak_fall;  // w * -s
};
struct ScreenTail {
  TailSums sums;
  TailMost most;
};
constexpr int kTailSums = int(sizeof(TailSums) / sizeof(float)), kTailMax = int(sizeof(TailMost) / sizeof(float));

__device__ __forceinline__ TailSums sum_of(const TailSums& a, const TailSums& b) {
  return {
      a.upper + b.upper,           a.lower + b.lower,           a.weight + b.weight, a.squares + b.squares,
      a.upper_fall + b.upper_fall, a.lower_fall + b.lower_fall, a.fall + b.fall,     a.turn_squares + b.turn_squares};
}
__device__ __forceinline__ TailMost most_of(const TailMost& a, const TailMost& b) {
  return {fmaxf(a.peak, b.peak), fmaxf(a.error, b.error), fmaxf(a.noise, b.noise), fmaxf(a.peak_fall, b.peak_fall)};
}

// An entry whose approximation lies `from` above the reference, which is not below its true logit.
__device__ __forceinline__ void add_to_tail(ScreenTail& tail, float from, const ScreenError& error, float degrees) {
  constexpr float kLowest = -1000.0f;  // exp of which is 0
  const float high = fmaxf((from + error.all) * degrees, kLowest), low = fmaxf((from - error.all) * degrees, kLowest);
  const float middle = fmaxf(from * degrees, kLowest);
  const float w_high = fast_exp2(high * kLog2OfE), w_low = fast_exp2(low * kLog2OfE), w = fast_exp2(middle * kLog2OfE);
  const float falling = -w * middle, turn = w * (1.0f + middle);
  tail.sums = sum_of(tail.sums, {w_high, w_low, w, w * w, -w_high * low, -w_low * high, falling, turn * turn});
  const bool counts = w_high > 0.0f;
  tail.most =
      most_of(tail.most, {w, counts ? error.all * degrees : 0.0f, counts ? error.noise * degrees : 0.0f, falling});
}

struct Interval {
  double low, high;
};
__device__ __forceinline__ Interval scaled(Interval a, double positive) {
  return {a.low * positive, a.high * positive};
}
__device__ __forceinline__ Interval sum_of(Interval a, Interval b) { return {a.low + b.low, a.high + b.high}; }
__device__ __forceinline__ Interval within(Interval a, Interval b) {
  return {fmax(a.low, b.low), fmin(a.high, b.high)};
}
__device__ __forceinline__ double nearest(Interval a, double number) { return fmin(fmax(number, a.low), a.high); }

// What is given as a figure, and what the whole head may have.
struct ScreenFigure {
  double value;
  Interval bounds;
};
struct ScreenStats {
  ScreenFigure max_prob, margin, entropy;
};

// What the tail adds to the sums, from the reference: the narrower of the entries each by itself and all together.
__device__ inline void tail_intervals(const ScreenTail& tail, double spread, Interval& rest, Interval& rest_fall) {
  const double error = tail.most.error, noise = tail.most.noise, peak = tail.most.peak;
  const double weight = tail.sums.weight, fall = tail.sums.fall;
  rest = {tail.sums.lower, tail.sums.upper};
  rest_fall = {0.0, double(-negative_infinity())};
  if (error < 300) rest_fall = {tail.sums.lower_fall, tail.sums.upper_fall};
  if (!(error < 20)) return;
  // exp(x) <= 1 + x + curvature * x^2 for |x| <= error
  const double curvature = error < 1e-3 ? 0.501 : (expm1(error) - error) / (error * error) * kBoundOutward;
  const double off = sqrt(double(tail.sums.squares)) * spread, more = curvature * peak * spread * spread;
  rest = within(rest, {(weight - off) * exp(-noise), (weight + off + more) * exp(noise)});
  const double turned = sqrt(double(tail.sums.turn_squares)) * spread + noise * (weight + fall);
  const double bent =
      (tail.most.peak_fall + (error + 2) * peak) * spread * spread + (fall + (error + 2) * weight) * noise * noise;
  const double off_fall = turned + exp(error) * bent;
  rest_fall = within(rest_fall, {fall - off_fall, fall + off_fall});
}

// sum and fall: of exp(s) and of exp(s) * -s over rechecked logits, s = (z - first) / T; first and second are the
// greatest. fall comes with its sign turned. spread: gain * length / T.
__device__ inline ScreenStats screen_stats(double sum, double turned_fall, float first, float second,
                                           const ScreenTail& tail, float reference, float temperature, double spread) {
  Interval rest, rest_fall;
  tail_intervals(tail, spread, rest, rest_fall);
  const double fall = -turned_fall;
  // The tail is measured from the reference, which lies `gap` below the first.
  const double gap = (double(first) - reference) / temperature, scale = exp(-gap);
  const Interval all = sum_of(scaled(rest, scale), {sum, sum});
  Interval all_fall = {fall, fall};
  if (scale > 0) all_fall = sum_of(scaled(sum_of(rest_fall, scaled(rest, gap)), scale), all_fall);
  const double lead = second > negative_infinity() ? -expm1((double(second) - first) / temperature) : 1.0;
  const double size = sum + tail.sums.weight * scale;
  const double size_fall = fall + (tail.sums.fall + gap * tail.sums.weight) * scale;
  const Interval max_prob = {(1 - kFloatRoom) / all.high, (1 + kFloatRoom) / all.low};
  const double highest = log(all.high) + all_fall.high / all.low, room = 2 * kFloatRoom * (1 + highest);
  const Interval entropy = {fmax(0.0, log(all.low) + all_fall.low / all.high - room), highest + room};
  const double value = fmin(1.0, nearest(max_prob, 1 / size));
  return {{value, max_prob},
          {value * lead, scaled(max_prob, lead)},
          {nearest(entropy, log(size) + size_fall / size), entropy}};
}

__device__ inline bool is_settled(const ScreenStats& f, ExitMeasure measure, float threshold, float tolerance) {
  const auto error = [](const ScreenFigure& of) { return fmax(of.bounds.high - of.value, of.value - of.bounds.low); };
  if (!(error(f.max_prob) <= tolerance && error(f.margin) <= tolerance)) return false;
  const Interval bounds = measure == ExitMeasure::kEntropy  ? f.entropy.bounds
                          : measure == ExitMeasure::kMargin ? f.margin.bounds
                                                            : f.max_prob.bounds;
  return measure == ExitMeasure::kNone || bounds.low > threshold || bounds.high < threshold;
}

}  // namespace specdec::cuda

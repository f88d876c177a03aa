// The screened head's arithmetic on a GPU: how far an approximate logit may be off, and what entries that are not
// rechecked may add to the sums of a softmax. What follows from those sums, and why, is in early_exit/screen_bounds.h.
#pragma once

#include "common/cuda/device.cuh"
#include "early_exit/cuda/exit_state.cuh"
#include "early_exit/params.h"
#include "early_exit/screen_bounds.h"

namespace specdec::cuda {

struct ScreenError {
  float noise, all;  // the part that is not by_error's, and all of it
};
__device__ __forceinline__ ScreenError screen_error(const ScreenBound& bound, float approximate, float error_norm,
                                                    float norm) {
  const float noise = kScreenRounding * fabsf(approximate) + (bound.by_norm * norm + bound.floor);
  return {noise, bound.by_error * error_norm + noise};
}

// A ScreenTail in float32, as the threads of a block add it up: sums, and greatest values.
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
struct TailParts {
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
__device__ __forceinline__ void add_to_tail(TailParts& tail, float from, const ScreenError& error,
                                            float inverse_temperature) {
  constexpr float kLowest = -1000.0f;  // exp of which is 0
  const float high = fmaxf((from + error.all) * inverse_temperature, kLowest),
              low = fmaxf((from - error.all) * inverse_temperature, kLowest);
  const float middle = fmaxf(from * inverse_temperature, kLowest);
  const float w_high = fast_exp2(high * kLog2E), w_low = fast_exp2(low * kLog2E), w = fast_exp2(middle * kLog2E);
  const float falling = -w * middle, turn = w * (1.0f + middle);
  tail.sums = sum_of(tail.sums, {w_high, w_low, w, w * w, -w_high * low, -w_low * high, falling, turn * turn});
  const bool counts = w_high > 0.0f;
  tail.most = most_of(tail.most, {w, counts ? error.all * inverse_temperature : 0.0f,
                                  counts ? error.noise * inverse_temperature : 0.0f, falling});
}

__device__ __forceinline__ ScreenTail tail_of(const TailParts& parts) {
  ScreenTail tail;
  tail.upper = parts.sums.upper;
  tail.lower = parts.sums.lower;
  tail.weight = parts.sums.weight;
  tail.squares = parts.sums.squares;
  tail.peak = parts.most.peak;
  tail.error = parts.most.error;
  tail.noise = parts.most.noise;
  tail.upper_fall = parts.sums.upper_fall;
  tail.lower_fall = parts.sums.lower_fall;
  tail.fall = parts.sums.fall;
  tail.turn_squares = parts.sums.turn_squares;
  tail.peak_fall = parts.most.peak_fall;
  return tail;
}

}  // namespace specdec::cuda

// The scans of approximate logits (early_exit/cpu/screen_kernels.h) of one instruction set. One pass each, a vector at a time.
#pragma once

#include "common/cpu/simd_int.h"
#include "early_exit/cpu/screen_kernels.h"

namespace specdec::cpu::SPECDEC_ISA {

// Of a vector of approximations, the part of the bound that is not by_error's, then all of it.
static SPECDEC_INLINE Vec noise_of(const ScreenBound& bound, Vec approximate, Vec norms) {
  const Vec size = maximum(approximate, splat(0.0f) - approximate);
  return fma(splat(kScreenRounding), size, fma(splat(bound.by_norm), norms, splat(bound.floor)));
}
static SPECDEC_INLINE Vec error_of(const ScreenBound& bound, Vec noise, Vec error_norms) {
  return fma(splat(bound.by_error), error_norms, noise);
}

static bool note(const float* approximate, const float* error_norms, const float* norms, int count,
                 const ScreenBound& bound, int top_k, float* lower) {
  constexpr unsigned kAll = kWidth == 16 ? 0xffffu : 0xffu;
  const Vec infinity = splat(__builtin_inff());
  unsigned finite = kAll;
  for (int i = 0; i < count; i += kWidth) {
    const Vec a = load(approximate + i), clamped = maximum(a, splat(kLowestLogit));
    finite &= lanes_above(infinity, a);
    const Vec error = error_of(bound, noise_of(bound, clamped, load(norms + i)), load(error_norms + i));
    const Vec low = a - error;
    if (!any_above(low, splat(lower[top_k - 1]))) continue;
    alignas(64) float each[kWidth];
    store(each, low);
    for (int lane = 0; lane < kWidth; lane++) {
      int at = top_k - 1;
      if (!(each[lane] > lower[at])) continue;
      for (; at > 0 && each[lane] > lower[at - 1]; at--) lower[at] = lower[at - 1];
      lower[at] = each[lane];
    }
  }
  return finite == kAll;
}

static float longest(const float* error_norms, const float* norms, int count) {
  Vec most = splat(0.0f);
  for (int i = 0; i < count; i += kWidth) most = maximum(load(error_norms + i) + load(norms + i), most);
  return greatest(most);
}

// A logit's error over the temperature up to which exp(error) and exp(-error) come from polynomials.
constexpr float kSmallError = 4;

// Not below exp(error) and not above exp(-error), for errors from 0 to kSmallError: the series up to the third power,
// and so much of the fourth that the bound holds at its end. What is left of the series, divided by the fourth power,
// grows towards the end in the first case, and falls in the second.
static SPECDEC_INLINE void bound_exponentials(Vec error, Vec& above, Vec& below) {
  const Vec square = error * error, fourth = square * square;
  const Vec even = fma(splat(0.5f), square, splat(1.0f));
  const Vec odd = error * fma(splat(1.0f / 6), square, splat(1.0f));
  above = fma(splat(0.12083f), fourth, even + odd);
  below = maximum(fma(splat(0.0222f), fourth, even - odd), splat(0.0f));
}

static int scan(const float* approximate, const float* error_norms, const float* norms, int count, const ScreenScan& s,
                int32_t first_entry, int32_t* entries, ScreenTail& tail) {
  const Vec zero = splat(0.0f), one = splat(1.0f), minus_infinity = splat(-__builtin_inff());
  const Vec per_degree = splat(1.0f / s.temperature), lowest = splat(-1000.0f);  // exp of which is 0
  const Vec log2e = splat(kLog2E);
  Vec upper = zero, lower = zero, weight = zero, squares = zero, peak = zero, worst = zero, worst_noise = zero;
  Vec upper_fall = zero, lower_fall = zero, fall = zero, turn_squares = zero, peak_fall = zero;
  int found = 0;
  for (int i = 0; i < count; i += kWidth) {
    const Vec original = load(approximate + i), a = maximum(original, splat(kLowestLogit));
    const Vec noise = noise_of(s.bound, a, load(norms + i));
    const Vec error = error_of(s.bound, noise, load(error_norms + i));
    const unsigned below = lanes_above(splat(s.cut), a + error) & ~lanes_above(a, splat(s.deep));
    const unsigned exists = lanes_above(original, minus_infinity);
    const unsigned chosen = exists & ~below;
    for (unsigned rest = chosen; rest; rest &= rest - 1) {
      entries[found++] = first_entry + i + __builtin_ctz(rest);
    }
    const unsigned outside = chosen | ~exists;
    const Vec from = a - splat(s.reference);
    const Vec high = maximum((from + error) * per_degree, lowest), low = maximum((from - error) * per_degree, lowest);
    const Vec middle = maximum(from * per_degree, lowest);
    const Vec w = zero_where(exp2(middle * log2e), outside), falling = zero - w * middle;
    Vec w_high, w_low;
    if (any_above(error * per_degree, splat(kSmallError))) {
      w_high = zero_where(exp2(high * log2e), outside);
      w_low = zero_where(exp2(low * log2e), outside);
    } else {
      bound_exponentials(error * per_degree, w_high, w_low);
      w_high = w * w_high;
      w_low = w * w_low;
    }
    upper = upper + w_high;
    lower = lower + w_low;
    weight = weight + w;
    squares = fma(w, w, squares);
    peak = maximum(w, peak);
    worst = maximum(zero_unless_above(error * per_degree, w_high, zero), worst);
    worst_noise = maximum(zero_unless_above(noise * per_degree, w_high, zero), worst_noise);
    upper_fall = upper_fall - w_high * low;
    lower_fall = lower_fall - w_low * high;
    fall = fall + falling;
    const Vec turn = w * (one + middle);
    turn_squares = fma(turn, turn, turn_squares);
    peak_fall = maximum(falling, peak_fall);
  }
  tail.upper += total(upper);
  tail.lower += total(lower);
  tail.weight += total(weight);
  tail.squares += total(squares);
  tail.peak = max_of(tail.peak, double(greatest(peak)));
  tail.error = max_of(tail.error, double(greatest(worst)));
  tail.noise = max_of(tail.noise, double(greatest(worst_noise)));
  tail.upper_fall += total(upper_fall);
  tail.lower_fall += total(lower_fall);
  tail.fall += total(fall);
  tail.turn_squares += total(turn_squares);
  tail.peak_fall = max_of(tail.peak_fall, double(greatest(peak_fall)));
  return found;
}

static void weigh(const float* logits, int count, float first, float temperature, double& sum, double& fall) {
  constexpr int kBlock = 512;  // more would round too much
  const Vec per_degree = splat(1.0f / temperature), lowest = splat(-1000.0f), log2e = splat(kLog2E);
  for (int begin = 0; begin < count; begin += kBlock) {
    Vec of_block = splat(0.0f), fall_of_block = of_block;
    for (int i = begin; i < min_of(begin + kBlock, count); i += kWidth) {
      const Vec s = maximum((load(logits + i) - splat(first)) * per_degree, lowest), w = exp2(s * log2e);
      of_block = of_block + w;
      fall_of_block = fall_of_block - w * s;
    }
    sum += total(of_block);
    fall += total(fall_of_block);
  }
}

const ScreenKernels kScreenKernels = {note, longest, scan, weigh};

}  // namespace specdec::cpu::SPECDEC_ISA

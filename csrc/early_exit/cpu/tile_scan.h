// The early exit kernels (early_exit/cpu/exit_kernels.h) of one instruction set.
//
// A row takes a tile's 64 logits in with two scans: for those among its greatest, then for the exponentials.
#pragma once

#include "common/cpu/simd.h"
#include "common/cpu/simd_int.h"
#include "early_exit/cpu/exit_kernels.h"

namespace specdec::cpu::SPECDEC_ISA {

// Puts a logit where it belongs among the greatest ones. Entries come in ascending order, so equals stay behind.
static SPECDEC_INLINE void list(float value, int32_t entry, int top_k, ExitState& state) {
#if defined(__AVX512F__)
  (void)top_k;
  static_assert(kMaxTopK == kWidth, "");
  const Vec values = load(state.value);
  const __mmask16 ahead = _mm512_cmp_ps_mask(values, splat(value), _CMP_GE_OQ), others = ~(ahead + 1);
  store(state.value, _mm512_mask_expand_ps(splat(value), others, values));
  const __m512i entries = _mm512_loadu_si512(state.entry);
  _mm512_storeu_si512(state.entry, _mm512_mask_expand_epi32(_mm512_set1_epi32(entry), others, entries));
#else
  int at = top_k - 1;
  for (; at > 0 && value > state.value[at - 1]; at--) {
    state.value[at] = state.value[at - 1];
    state.entry[at] = state.entry[at - 1];
  }
  state.value[at] = value;
  state.entry[at] = entry;
#endif
}

// Logits that are less than as many others as are listed: less than as many of the lanes' peaks.
static SPECDEC_INLINE uint64_t below_the_greatest(const float* logits, Vec peaks, int top_k) {
  for (int i = 1; i < min_of(top_k, kWidth); i++) peaks = keep_where_less(peaks, peaks, splat(greatest(peaks)));
  const Vec bound = splat(top_k > kWidth ? -__builtin_inff() : greatest(peaks));
  uint64_t below = 0;
  SPECDEC_UNROLL
  for (int i = 0; i < kWeightTile; i += kWidth) below |= uint64_t(lanes_above(bound, load(logits + i))) << i;
  return below;
}

static void absorb(float* logits, const float* scales, const float* bias, int32_t first_entry, float factor, int top_k,
                   ExitState& state) {
  constexpr unsigned kAll = kWidth == 16 ? 0xffffu : 0xffu;
  const Vec infinity = splat(__builtin_inff()), least = splat(state.value[top_k - 1]);
  Vec peaks = splat(-__builtin_inff());
  unsigned finite = kAll;
  uint64_t greater = 0;
  SPECDEC_UNROLL
  for (int i = 0; i < kWeightTile; i += kWidth) {
    Vec z = load(logits + i);
    if (scales) z = z * load(scales + i);
    if (bias) z = z + load(bias + i);
    if (scales || bias) store(logits + i, z);
    finite &= lanes_above(infinity, z);
    greater |= uint64_t(lanes_above(z, least)) << i;
    peaks = maximum(z, peaks);  // the second operand where the first is a NaN
  }
  if (finite != kAll) state.invalid = true;
  if (!(state.value[top_k - 1] > -__builtin_inff())) greater &= ~below_the_greatest(logits, peaks, top_k);
  const float before = state.value[0];
  for (; greater; greater &= greater - 1) {
    const int i = __builtin_ctzll(greater);
    if (logits[i] > state.value[top_k - 1]) list(logits[i], first_entry + i, top_k, state);
  }
  const float top = state.value[0];
  if (!(top > -__builtin_inff())) return;
  constexpr float kLowestFall = -1e30f;  // 2 to the power of which is 0: -inf would make NaN of 0 * -inf
  if (top > before && state.sum > 0) {
    const float fall = __builtin_fmaxf(before - top, kLowestFall), decay = __builtin_exp2f(fall * factor);
    state.weighted_logit_sum = (state.weighted_logit_sum + state.sum * fall) * decay;
    state.sum *= decay;
  }
  const Vec max = splat(top), scale = splat(factor);
  Vec sum = splat(0.0f), weighted_logit_sum = splat(0.0f);
  SPECDEC_UNROLL
  for (int i = 0; i < kWeightTile; i += kWidth) {
    const Vec below = maximum(load(logits + i) - max, splat(kLowestFall));
    const Vec weight = exp2(below * scale);
    sum = sum + weight;
    weighted_logit_sum = fma(weight, below, weighted_logit_sum);
  }
  state.sum += total(sum);
  state.weighted_logit_sum += total(weighted_logit_sum);
}

const ExitKernels kExitKernels = {absorb};

}  // namespace specdec::cpu::SPECDEC_ISA

// The early exit kernels (early_exit/cpu/exit_kernels.h) of one instruction set.
//
// Logits of a tile are dot products (linear/cpu/dots.h); those of a bfloat16 head with many rows have a form of their own
// where the processor multiplies pairs (linear/cpu/quads.h). A row takes a tile's 64 logits in with two looks: for those
// among its greatest, then for the exponentials.
#pragma once

#include "common/cpu/simd_int.h"
#include "early_exit/cpu/exit_kernels.h"
#include "linear/cpu/dots.h"
#if defined(__AVX512BF16__)
#include "linear/cpu/quads.h"
#endif

namespace specdec::cpu::SPECDEC_ISA {

static void multiply(HeadType type, const ExitTile& tile, const char* packed, int rows, int call_rows, float* logits) {
  with_head(type, [&](auto multiplier) {
    using Multiplier = decltype(multiplier);
#if defined(__AVX512BF16__)
    if (takes_quads(type, tile.dim, call_rows)) {
      const int stride = packed_dim<BFloat16Pairs>(tile.dim);
      return multiply_quads(tile, reinterpret_cast<const uint16_t*>(packed), stride, rows, call_rows, logits);
    }
#endif
    multiply_rows<Multiplier>(tile, packed, rows, call_rows, logits);
  });
}

static void round(HeadType type, float* y, int dim) {
  with_head(type, [&](auto multiplier) { decltype(multiplier)::round(y, dim); });
}

static size_t packed_bytes(HeadType type, int dim) {
  return with_head(type, [&](auto multiplier) {
    using Multiplier = decltype(multiplier);
    return size_t(packed_dim<Multiplier>(dim)) * sizeof(typename Multiplier::Hidden);
  });
}

static void pack(HeadType type, const float* y, int dim, char* packed, int row, int rows, int call_rows) {
  with_head(type, [&](auto multiplier) {
    using Multiplier = decltype(multiplier);
#if defined(__AVX512BF16__)
    if (takes_quads(type, dim, call_rows)) {
      const int stride = packed_dim<BFloat16Pairs>(dim);
      return pack_quads(y, dim, stride, reinterpret_cast<uint16_t*>(packed), row, rows);
    }
#else
    (void)call_rows;
#endif
    constexpr int kStep = Multiplier::kStep;
    const int first = row / kTogether * kTogether, together = min_of(kTogether, rows - first);
    const int whole = packed_dim<Multiplier>(dim);
    auto* to = reinterpret_cast<typename Multiplier::Hidden*>(packed) + int64_t(first) * whole + (row - first) * kStep;
    static_assert(kHiddenStep % kStep == 0, "");
    for (int d = 0; d < whole; d += kStep, to += together * kStep) Multiplier::pack(y + d, to);
  });
}

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
  for (int i = 0; i < kExitTile; i += kWidth) below |= uint64_t(lanes_above(bound, load(logits + i))) << i;
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
  for (int i = 0; i < kExitTile; i += kWidth) {
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
  for (int i = 0; i < kExitTile; i += kWidth) {
    const Vec below = maximum(load(logits + i) - max, splat(kLowestFall));
    const Vec weight = exp2(below * scale);
    sum = sum + weight;
    weighted_logit_sum = fma(weight, below, weighted_logit_sum);
  }
  state.sum += total(sum);
  state.weighted_logit_sum += total(weighted_logit_sum);
}

// The last elements of a row, fewer than a vector, and zeros.
template <class Storage>
struct Rest {
  typename Storage::Element padded[kWidth] = {};
  Rest(const typename Storage::Element* from, int count) { __builtin_memcpy(padded, from, count * sizeof(padded[0])); }
};

template <class Storage>
static void normalise_row(const ExitParams& p, int row, float* y) {
  const auto* x = static_cast<const typename Storage::Element*>(p.hidden) + row * p.hidden_stride_row;
  const int whole = p.dim / kWidth * kWidth;
  Vec squares = splat(0.0f);
  const auto take = [&](const auto* from, int d) {
    const Vec v = Storage::load_vec(from);
    store(y + d, v);
    squares = fma(v, v, squares);
  };
  for (int d = 0; d < whole; d += kWidth) take(x + d, d);
  if (whole < p.dim) take(Rest<Storage>(x + whole, p.dim - whole).padded, whole);
  if (!p.norm_weight) return;
  const Vec scale = splat(1.0f / __builtin_sqrtf(total(squares) / float(p.dim) + p.norm_eps));
  for (int d = 0; d < p.dim; d += kWidth) store(y + d, load(y + d) * scale);
}

template <class Storage>
static void weigh_row(const ExitParams& p, float* y) {
  const auto* weight = static_cast<const typename Storage::Element*>(p.norm_weight);
  const int whole = p.dim / kWidth * kWidth;
  for (int d = 0; d < whole; d += kWidth) store(y + d, load(y + d) * Storage::load_vec(weight + d));
  if (whole == p.dim) return;
  const Rest<Storage> rest(weight + whole, p.dim - whole);
  store(y + whole, load(y + whole) * Storage::load_vec(rest.padded));
}

static void normalise(const ExitParams& p, int row, float* y) {
  if (p.hidden_dtype == DType::kFloat32) normalise_row<Float32>(p, row, y);
  if (p.hidden_dtype == DType::kBFloat16) normalise_row<BFloat16>(p, row, y);
  if (p.hidden_dtype == DType::kFloat16) normalise_row<Float16>(p, row, y);
  if (!p.norm_weight) return;
  if (p.norm_dtype == DType::kFloat32) weigh_row<Float32>(p, y);
  if (p.norm_dtype == DType::kBFloat16) weigh_row<BFloat16>(p, y);
  if (p.norm_dtype == DType::kFloat16) weigh_row<Float16>(p, y);
}

const ExitKernels kExitKernels = {normalise, packed_bytes, pack, round, multiply, absorb};

}  // namespace specdec::cpu::SPECDEC_ISA

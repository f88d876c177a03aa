// Rows of x in integers of 16 bits, for AVX-512's dot products of bytes: vpdpbusd multiplies unsigned bytes of the
// weights with signed ones of the rows, and adds four products.
//
// A piece of a row becomes integers and a scale, scale * (256 * high + low) with both bytes from -128 to 127: it is off
// by at most half of the piece's greatest size over 32,639. The weights take the unsigned side: an int8 with its top bit
// turned over is w + 128, half a byte is q as it lies, and what is too much, 128 or 8 times the sum of the row's
// integers, is taken off again.
#pragma once

#include <immintrin.h>

#include "common/cpu/simd.h"

namespace specdec::cpu::SPECDEC_ISA {

constexpr int kMax = 127 * 256 + 127;  // of two bytes

struct Rounding {
  float scale;
  double inverse;  // 0 where nothing is left of the piece, or it is not finite
  SPECDEC_INLINE __m512i apply(Vec y) const {
    const __m512d times = _mm512_set1_pd(inverse);
    const __m256i low = _mm512_cvtpd_epi32(_mm512_mul_pd(low_half(y), times));
    const __m256i high = _mm512_cvtpd_epi32(_mm512_mul_pd(high_half(y), times));
    const __m512i whole = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    return _mm512_max_epi32(_mm512_min_epi32(whole, _mm512_set1_epi32(kMax)), _mm512_set1_epi32(-kMax));
  }
  static SPECDEC_INLINE __m512d low_half(Vec v) { return _mm512_cvtps_pd(_mm512_castps512_ps256(v)); }
  static SPECDEC_INLINE __m512d high_half(Vec v) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)); }
};

// What rounds a finite piece; a scale of NaN where it is not. Zeros follow the piece.
static Rounding rounding_of(const float* y, int dims) {
  Vec most = splat(0.0f);
  __mmask16 finite = 0xffff;
  for (int d = 0; d < dims; d += kWidth) {
    const Vec size = _mm512_abs_ps(load(y + d));
    finite &= _mm512_cmp_ps_mask(size, splat(__builtin_inff()), _CMP_LT_OQ);
    most = _mm512_max_ps(size, most);
  }
  if (finite != 0xffff) return {__builtin_nanf(""), 0.0};
  const float scale = _mm512_reduce_max_ps(most) / kMax;
  return {scale, scale > 0 ? 1.0 / scale : 0.0};
}

// Sixteen dims: their integers, and the two bytes of each.
struct Bytes {
  __m512i whole;
  __m128i high, low;
  SPECDEC_INLINE Bytes(const Rounding& rounding, const float* y) {
    whole = rounding.inverse > 0 ? rounding.apply(load(y)) : _mm512_setzero_si512();
    const __m512i signed_low = _mm512_srai_epi32(_mm512_slli_epi32(whole, 24), 24);
    high = _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_sub_epi32(whole, signed_low), 8));
    low = _mm512_cvtepi32_epi8(signed_low);
  }
};

static SPECDEC_INLINE void put(char* to, __m128i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), v); }

}  // namespace specdec::cpu::SPECDEC_ISA

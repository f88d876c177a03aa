// Comparisons, integers and Philox for the row kernels, beside simd.h.
#pragma once

#include "common/cpu/simd.h"
#include "common/philox.h"

namespace specdec::cpu::SPECDEC_ISA {

#if defined(__AVX512F__)

using Bits = __m512i;

static SPECDEC_INLINE unsigned lanes_above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
static SPECDEC_INLINE unsigned lanes_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
static SPECDEC_INLINE Vec zero_unless_above(Vec v, Vec a, Vec b) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), v);
}
static SPECDEC_INLINE Vec zero_unless_from(Vec v, Vec a, Vec b) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), v);
}
// Lanes of v whose bit in `lanes` is 0.
static SPECDEC_INLINE Vec zero_where(Vec v, unsigned lanes) { return _mm512_maskz_mov_ps(__mmask16(~lanes), v); }

class NanFlag {
 public:
  SPECDEC_INLINE void look_at(Vec a, Vec b) { found_ |= _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
  SPECDEC_INLINE bool any() const { return found_ != 0; }

 private:
  __mmask16 found_ = 0;
};

static SPECDEC_INLINE Bits splat_bits(uint32_t x) { return _mm512_set1_epi32(int(x)); }
static SPECDEC_INLINE Bits add_bits(Bits a, Bits b) { return _mm512_add_epi32(a, b); }
static SPECDEC_INLINE Bits exclusive_or(Bits a, Bits b, Bits c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
static SPECDEC_INLINE void multiply_wide(Bits a, Bits b, Bits& high, Bits& low) {
  const Bits even = _mm512_mul_epu32(a, b), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), b);
  high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
  low = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
}
// Place 4 * j + r holds 4 * r + j, so that interleave() puts neighbours side by side.
static SPECDEC_INLINE Bits quad_order() {
  return _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
}
static SPECDEC_INLINE void interleave(Bits (&v)[4]) {
  const Bits a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
  const Bits c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
  v[0] = _mm512_unpacklo_epi64(a, c);
  v[1] = _mm512_unpackhi_epi64(a, c);
  v[2] = _mm512_unpacklo_epi64(b, d);
  v[3] = _mm512_unpackhi_epi64(b, d);
}
static SPECDEC_INLINE Vec to_float(Bits x) { return _mm512_cvtepu32_ps(x); }

static SPECDEC_INLINE float greatest(Vec v) { return _mm512_reduce_max_ps(v); }
static SPECDEC_INLINE float total(Vec v) { return _mm512_reduce_add_ps(v); }

#elif defined(__AVX2__)

using Bits = __m256i;

static SPECDEC_INLINE unsigned lanes_above(Vec a, Vec b) {
  return unsigned(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
}
static SPECDEC_INLINE unsigned lanes_equal(Vec a, Vec b) {
  return unsigned(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)));
}
static SPECDEC_INLINE Vec zero_unless_above(Vec v, Vec a, Vec b) {
  return _mm256_and_ps(v, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
static SPECDEC_INLINE Vec zero_unless_from(Vec v, Vec a, Vec b) {
  return _mm256_and_ps(v, _mm256_cmp_ps(a, b, _CMP_GE_OQ));
}
static SPECDEC_INLINE Vec zero_where(Vec v, unsigned lanes) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i clear =
      _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(lanes)), bit), _mm256_setzero_si256());
  return _mm256_and_ps(v, _mm256_castsi256_ps(clear));
}

class NanFlag {
 public:
  SPECDEC_INLINE void look_at(Vec a, Vec b) { found_ = _mm256_or_ps(found_, _mm256_cmp_ps(a, b, _CMP_UNORD_Q)); }
  SPECDEC_INLINE bool any() const { return _mm256_movemask_ps(found_) != 0; }

 private:
  Vec found_ = _mm256_setzero_ps();
};

static SPECDEC_INLINE Bits splat_bits(uint32_t x) { return _mm256_set1_epi32(int(x)); }
static SPECDEC_INLINE Bits add_bits(Bits a, Bits b) { return _mm256_add_epi32(a, b); }
static SPECDEC_INLINE Bits exclusive_or(Bits a, Bits b, Bits c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
static SPECDEC_INLINE void multiply_wide(Bits a, Bits b, Bits& high, Bits& low) {
  const Bits even = _mm256_mul_epu32(a, b), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), b);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}
static SPECDEC_INLINE Bits quad_order() { return _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7); }
static SPECDEC_INLINE void interleave(Bits (&v)[4]) {
  const Bits a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]);
  const Bits c = _mm256_unpacklo_epi32(v[2], v[3]), d = _mm256_unpackhi_epi32(v[2], v[3]);
  v[0] = _mm256_unpacklo_epi64(a, c);
  v[1] = _mm256_unpackhi_epi64(a, c);
  v[2] = _mm256_unpacklo_epi64(b, d);
  v[3] = _mm256_unpackhi_epi64(b, d);
}
// Rounds once, as a conversion of unsigned integers would: the product is exact.
static SPECDEC_INLINE Vec to_float(Bits x) {
  const Vec high = _mm256_cvtepi32_ps(_mm256_srli_epi32(x, 16));
  return fma(high, splat(65536.0f), _mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32(0xffff))));
}

static SPECDEC_INLINE float greatest(Vec v) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
static SPECDEC_INLINE float total(Vec v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

#else

typedef uint32_t Bits __attribute__((vector_size(32)));

static SPECDEC_INLINE unsigned lanes_of(VecInt mask) {
  unsigned lanes = 0;
  for (int i = 0; i < kWidth; i++) lanes |= unsigned(mask[i] & 1) << i;
  return lanes;
}
static SPECDEC_INLINE unsigned lanes_above(Vec a, Vec b) { return any_above(a, b) ? lanes_of(a > b) : 0; }
static SPECDEC_INLINE unsigned lanes_equal(Vec a, Vec b) { return lanes_of(a == b); }
static SPECDEC_INLINE Vec zero_unless_above(Vec v, Vec a, Vec b) { return (Vec)((VecInt)v & (a > b)); }
static SPECDEC_INLINE Vec zero_unless_from(Vec v, Vec a, Vec b) { return (Vec)((VecInt)v & (a >= b)); }
static SPECDEC_INLINE Vec zero_where(Vec v, unsigned lanes) {
  for (int i = 0; i < kWidth; i++)
    if (lanes >> i & 1) v[i] = 0.0f;
  return v;
}

class NanFlag {
 public:
  SPECDEC_INLINE void look_at(Vec a, Vec b) { found_ |= (a != a) | (b != b); }
  SPECDEC_INLINE bool any() const { return lanes_of(found_) != 0; }

 private:
  VecInt found_ = {};
};

static SPECDEC_INLINE Bits splat_bits(uint32_t x) { return Bits{x, x, x, x, x, x, x, x}; }
static SPECDEC_INLINE Bits add_bits(Bits a, Bits b) { return a + b; }
static SPECDEC_INLINE Bits exclusive_or(Bits a, Bits b, Bits c) { return a ^ b ^ c; }
static SPECDEC_INLINE void multiply_wide(Bits a, Bits b, Bits& high, Bits& low) {
  for (int i = 0; i < kWidth; i++) high[i] = uint32_t(uint64_t(a[i]) * b[i] >> 32);
  low = a * b;
}
static SPECDEC_INLINE Bits quad_order() { return Bits{0, 2, 4, 6, 1, 3, 5, 7}; }
static SPECDEC_INLINE void interleave(Bits (&v)[4]) {
  Bits rows[4];
  for (int j = 0; j < 2; j++)
    for (int r = 0; r < 4; r++)
      for (int i = 0; i < 4; i++) rows[r][4 * j + i] = v[i][4 * j + r];
  for (int r = 0; r < 4; r++) v[r] = rows[r];
}
static SPECDEC_INLINE Vec to_float(Bits x) {
  return __builtin_convertvector((VecInt)(x >> 16), Vec) * 65536.0f +
         __builtin_convertvector((VecInt)(x & 0xffff), Vec);
}

static SPECDEC_INLINE float greatest(Vec v) {
  float top = v[0];
  for (int i = 1; i < kWidth; i++) top = v[i] > top ? v[i] : top;
  return top;
}
static SPECDEC_INLINE float total(Vec v) {
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
}

#endif

// The uniforms of 4 * kWidth neighbouring tokens from `token` on, a multiple of 4.
static SPECDEC_INLINE void draw_uniforms(const NoiseKey& key, int32_t token, Vec (&uniform)[4]) {
  Bits c[4] = {add_bits(splat_bits(uint32_t(token) / 4), quad_order()), splat_bits(key.position),
               splat_bits(key.domain), splat_bits(key.detail)};
  uint32_t k0 = key.seed_low, k1 = key.seed_high;
  const Bits multiplier0 = splat_bits(kPhiloxMultiplier0), multiplier1 = splat_bits(kPhiloxMultiplier1);
  SPECDEC_UNROLL
  for (int round = 0; round < kPhiloxRounds; round++) {
    Bits high0, low0, high1, low1;
    multiply_wide(c[0], multiplier0, high0, low0);
    multiply_wide(c[2], multiplier1, high1, low1);
    c[0] = exclusive_or(high1, c[1], splat_bits(k0));
    c[1] = low1;
    c[2] = exclusive_or(high0, c[3], splat_bits(k1));
    c[3] = low0;
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  interleave(c);
  SPECDEC_UNROLL
  for (int i = 0; i < 4; i++) uniform[i] = (to_float(c[i]) + splat(0.5f)) * splat(0x1p-32f);
}

}  // namespace specdec::cpu::SPECDEC_ISA

// One vector type and the dozen operations that the CPU kernels need, for AVX-512, AVX2 and any other processor.
//
// This header is compiled once per instruction set: each translation unit that includes it defines SPECDEC_ISA, the
// namespace that keeps its code apart from the same code compiled with other flags. Only code inside that namespace may
// be instantiated here: an inline function of the standard library would be merged by the linker with its twins, and
// an AVX-512 copy could then run on a processor without it.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/constants.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef SPECDEC_ISA
#error "define SPECDEC_ISA, the namespace of this instruction set, before including simd.h"
#endif

#define SPECDEC_INLINE inline __attribute__((always_inline))
#define SPECDEC_UNROLL _Pragma("GCC unroll 32")

namespace specdec::cpu::SPECDEC_ISA {

template <class T>
static constexpr SPECDEC_INLINE T min_of(T a, T b) {
  return a < b ? a : b;
}

template <class T>
static constexpr SPECDEC_INLINE T max_of(T a, T b) {
  return a > b ? a : b;
}

static SPECDEC_INLINE int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Polynomials for 2^f. The first serves fp32: relative error below 3e-7 on [-0.5, 0.5]. The second serves weights that
// are rounded to bfloat16 next (half a unit there is 2e-3): relative error below 9e-5 on [0, 1), and 1 at 0.
#define SPECDEC_EXP2_POLYNOMIAL(f)                                                                           \
  fma(fma(fma(fma(fma(fma(splat(1.535336188e-4f), f, splat(1.339887440e-3f)), f, splat(9.618437358e-3f)), f, \
                  splat(5.550332471e-2f)),                                                                   \
              f, splat(2.402264791e-1f)),                                                                    \
          f, splat(6.931472029e-1f)),                                                                        \
      f, splat(1.0f))
#define SPECDEC_EXP2_POLYNOMIAL_BF16(f) \
  fma(fma(fma(splat(7.706704e-2f), f, splat(2.2764499e-1f)), f, splat(6.9511679e-1f)), f, splat(1.0f))

#if defined(__AVX512F__)

using Vec = __m512;
constexpr int kWidth = 16;

static SPECDEC_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
static SPECDEC_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
static SPECDEC_INLINE Vec splat(float x) { return _mm512_set1_ps(x); }
static SPECDEC_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// A product that is rounded before anything is added to it: compilers would make one fma of the two. Where a maximum
// that was rounded like this is taken away, the greatest element gives exactly 0, however great it is.
static SPECDEC_INLINE Vec rounded_product(Vec a, Vec b) {
  Vec product = _mm512_mul_ps(a, b);
  asm("" : "+v"(product));
  return product;
}
static SPECDEC_INLINE Vec maximum(Vec a, Vec b) { return _mm512_max_ps(a, b); }
static SPECDEC_INLINE bool any_above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
static SPECDEC_INLINE bool any_nan(Vec v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) != 0; }

// Lane 2i of the result is lane 2i + 1, and the other way round.
static SPECDEC_INLINE Vec swap_neighbours(Vec v) { return _mm512_permute_ps(v, 0xb1); }

// Lanes of v where a < b, -inf elsewhere.
static SPECDEC_INLINE Vec keep_where_less(Vec v, Vec a, Vec b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), splat(-__builtin_inff()), v);
}

// Lanes of v whose 64-bit word has this bit set, -inf elsewhere.
static SPECDEC_INLINE Vec keep_where_bit(Vec v, const uint64_t* words, int bit) {
  const __m512i one = _mm512_set1_epi64(int64_t(1) << bit);
  const __mmask8 low = _mm512_test_epi64_mask(_mm512_loadu_si512(words), one);
  const __mmask8 high = _mm512_test_epi64_mask(_mm512_loadu_si512(words + 8), one);
  return _mm512_mask_blend_ps(__mmask16(low | (unsigned(high) << 8)), splat(-__builtin_inff()), v);
}

// 2^x for x <= 0 or a little above it; exactly 0 for -inf (scalef maps any significand and -inf to 0), NaN for NaN.
static SPECDEC_INLINE Vec exp2(Vec x) {
  const Vec n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(SPECDEC_EXP2_POLYNOMIAL((x - n)), n);
}
static SPECDEC_INLINE Vec exp2_bf16(Vec x) {  // scalef takes the floor of x itself, reduce what is left above it
  const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(SPECDEC_EXP2_POLYNOMIAL_BF16(f), x);
}

static SPECDEC_INLINE Vec load_bf16(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
static SPECDEC_INLINE void store_bf16(uint16_t* p, Vec v) {  // to nearest even; NaN stays NaN
  const __m512i i = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(i, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(i, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i bits = _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
}
static SPECDEC_INLINE Vec load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static SPECDEC_INLINE void store_f16(uint16_t* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// kWidth x kWidth floats; row i of the result is column i of the sixteen vectors.
static SPECDEC_INLINE void transpose(Vec (&rows)[16]) {
  Vec t[16];
  SPECDEC_UNROLL
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
  }
  SPECDEC_UNROLL
  for (int i = 0; i < 4; i++) {
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
    rows[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    rows[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    rows[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    rows[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  SPECDEC_UNROLL
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  SPECDEC_UNROLL
  for (int i = 0; i < 4; i++) {
    rows[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    rows[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    rows[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Lane i of the result is the sum of the lanes of vector i.
static SPECDEC_INLINE Vec sums(const Vec (&v)[16]) {
  Vec t[8], u[4];
  SPECDEC_UNROLL
  for (int i = 0; i < 8; i++) {
    t[i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]) + _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  }
  SPECDEC_UNROLL
  for (int i = 0; i < 4; i++) {
    const __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
    u[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  }
  const Vec low = _mm512_shuffle_f32x4(u[0], u[1], 0x44) + _mm512_shuffle_f32x4(u[0], u[1], 0xee);
  const Vec high = _mm512_shuffle_f32x4(u[2], u[3], 0x44) + _mm512_shuffle_f32x4(u[2], u[3], 0xee);
  return _mm512_shuffle_f32x4(low, high, 0x88) + _mm512_shuffle_f32x4(low, high, 0xdd);
}

#elif defined(__AVX2__)

using Vec = __m256;
constexpr int kWidth = 8;

static SPECDEC_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
static SPECDEC_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
static SPECDEC_INLINE Vec splat(float x) { return _mm256_set1_ps(x); }
static SPECDEC_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
static SPECDEC_INLINE Vec rounded_product(Vec a, Vec b) {
  Vec product = _mm256_mul_ps(a, b);
  asm("" : "+x"(product));
  return product;
}
static SPECDEC_INLINE Vec maximum(Vec a, Vec b) { return _mm256_max_ps(a, b); }
static SPECDEC_INLINE bool any_above(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }
static SPECDEC_INLINE bool any_nan(Vec v) { return _mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)) != 0; }
static SPECDEC_INLINE Vec swap_neighbours(Vec v) { return _mm256_permute_ps(v, 0xb1); }

static SPECDEC_INLINE Vec keep_where_less(Vec v, Vec a, Vec b) {
  return _mm256_blendv_ps(splat(-__builtin_inff()), v, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}

static SPECDEC_INLINE Vec keep_where_bit(Vec v, const uint64_t* words, int bit) {
  // The wanted bit of each 64-bit word becomes the sign of a 32-bit lane, which is what blendv tests.
  const __m256i low = _mm256_slli_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)), 63 - bit);
  const __m256i high = _mm256_slli_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + 4)), 63 - bit);
  const __m256 signs = _mm256_shuffle_ps(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high), 0xdd);
  const __m256 mask = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(signs), 0xd8));
  return _mm256_blendv_ps(splat(-__builtin_inff()), v, mask);
}

static SPECDEC_INLINE Vec exp2(Vec x) {
  const Vec clamped = maximum(splat(-126.0f), x);  // of two, the second where one is NaN
  const Vec n = _mm256_round_ps(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec p = SPECDEC_EXP2_POLYNOMIAL((clamped - n));
  const __m256i scaled = _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23));
  return _mm256_and_ps(_mm256_castsi256_ps(scaled), _mm256_cmp_ps(x, splat(-126.0f), _CMP_NLT_UQ));
}
static SPECDEC_INLINE Vec exp2_bf16(Vec x) { return exp2(x); }

static SPECDEC_INLINE Vec load_bf16(const uint16_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
static SPECDEC_INLINE void store_bf16(uint16_t* p, Vec v) {
  const __m256i i = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(i, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(i, _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd));
  const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  const __m256i bits =
      _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(nan)), 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
static SPECDEC_INLINE Vec load_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static SPECDEC_INLINE void store_f16(uint16_t* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

static SPECDEC_INLINE void transpose(Vec (&rows)[8]) {
  Vec t[8];
  SPECDEC_UNROLL
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
  }
  SPECDEC_UNROLL
  for (int i = 0; i < 2; i++) {
    rows[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    rows[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    rows[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    rows[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  SPECDEC_UNROLL
  for (int i = 0; i < 4; i++) {
    t[i] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x31);
  }
  SPECDEC_UNROLL
  for (int i = 0; i < 8; i++) rows[i] = t[i];
}

static SPECDEC_INLINE Vec sums(const Vec (&v)[8]) {
  Vec t[4], u[2];
  SPECDEC_UNROLL
  for (int i = 0; i < 4; i++) {
    t[i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]) + _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  }
  SPECDEC_UNROLL
  for (int i = 0; i < 2; i++) {
    u[i] = _mm256_shuffle_ps(t[2 * i], t[2 * i + 1], 0x44) + _mm256_shuffle_ps(t[2 * i], t[2 * i + 1], 0xee);
  }
  return _mm256_permute2f128_ps(u[0], u[1], 0x20) + _mm256_permute2f128_ps(u[0], u[1], 0x31);
}

#else  // GCC vector extensions: the compiler lowers them to what the target has

typedef float Vec __attribute__((vector_size(32)));
typedef int32_t VecInt __attribute__((vector_size(32)));
typedef uint32_t VecBits __attribute__((vector_size(32)));  // sums and shifts that may wrap
constexpr int kWidth = 8;

static SPECDEC_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
static SPECDEC_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
static SPECDEC_INLINE Vec splat(float x) { return Vec{x, x, x, x, x, x, x, x}; }
static SPECDEC_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
static SPECDEC_INLINE Vec rounded_product(Vec a, Vec b) {
  Vec product = a * b;
#if !defined(SPECDEC_X86) || defined(__FMA__)
  asm("" : "+m"(product));
#endif
  return product;
}
static SPECDEC_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
static SPECDEC_INLINE bool any_above(Vec a, Vec b) {
  const VecInt above = a > b;
  int any = 0;
  for (int i = 0; i < kWidth; i++) any |= above[i];
  return any != 0;
}
static SPECDEC_INLINE bool any_nan(Vec v) {
  const VecInt nan = v != v;
  int any = 0;
  for (int i = 0; i < kWidth; i++) any |= nan[i];
  return any != 0;
}
static SPECDEC_INLINE Vec swap_neighbours(Vec v) { return Vec{v[1], v[0], v[3], v[2], v[5], v[4], v[7], v[6]}; }
static SPECDEC_INLINE Vec keep_where_less(Vec v, Vec a, Vec b) { return a < b ? v : splat(-__builtin_inff()); }
static SPECDEC_INLINE Vec keep_where_bit(Vec v, const uint64_t* words, int bit) {
  VecInt set;
  for (int i = 0; i < kWidth; i++) set[i] = -int32_t((words[i] >> bit) & 1);
  return set ? v : splat(-__builtin_inff());
}
static SPECDEC_INLINE void transpose(Vec (&rows)[8]) {
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < i; j++) {
      const float swapped = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = swapped;
    }
}
static SPECDEC_INLINE Vec sums(const Vec (&v)[8]) {
  Vec total;
  for (int i = 0; i < 8; i++) {
    float sum = 0;
    for (int j = 0; j < 8; j++) sum += v[i][j];
    total[i] = sum;
  }
  return total;
}
static SPECDEC_INLINE Vec exp2(Vec x) {
  const Vec clamped = maximum(splat(-126.0f), x);  // of two, the second where one is NaN
  // Conversion rounds towards zero; the shift keeps it among positive numbers, where that is downwards.
  const VecInt n = __builtin_convertvector(clamped + 256.5f, VecInt) - 256;
  const Vec f = clamped - __builtin_convertvector(n, Vec);
  const Vec p = SPECDEC_EXP2_POLYNOMIAL(f);
  const VecInt scaled = (VecInt)((VecBits)p + ((VecBits)n << 23));
  return (Vec)(scaled & ~(x < splat(-126.0f)));
}
static SPECDEC_INLINE Vec exp2_bf16(Vec x) { return exp2(x); }

static SPECDEC_INLINE Vec load_bf16(const uint16_t* p) {
  VecInt bits;
  for (int i = 0; i < kWidth; i++) bits[i] = int32_t(uint32_t(p[i]) << 16);
  return (Vec)bits;
}
static SPECDEC_INLINE void store_bf16(uint16_t* p, Vec v) {
  for (int i = 0; i < kWidth; i++) {
    uint32_t bits;
    const float x = v[i];
    std::memcpy(&bits, &x, 4);
    p[i] = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}
static SPECDEC_INLINE float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
  float value;
  uint32_t bits = (magnitude << 13) + (magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u);  // inf and NaN keep theirs
  std::memcpy(&value, &bits, 4);
  if (magnitude < 0x0400) value = float(magnitude) * 0x1p-24f;  // subnormal
  std::memcpy(&bits, &value, 4);
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}
static SPECDEC_INLINE uint16_t float_to_half(float value) {  // to nearest even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to 65536 or more
  if (bits < 0x38800000) {                                 // subnormal: let the addition round
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return uint16_t(sign | (bits - 0x3f000000));
  }
  return uint16_t(sign | ((bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13));
}
static SPECDEC_INLINE Vec load_f16(const uint16_t* p) {
  Vec v;
  for (int i = 0; i < kWidth; i++) v[i] = half_to_float(p[i]);
  return v;
}
static SPECDEC_INLINE void store_f16(uint16_t* p, Vec v) {
  for (int i = 0; i < kWidth; i++) p[i] = float_to_half(v[i]);
}

#endif

// softcap * tanh(s / softcap). By exp2 of a number <= 0, so that nothing overflows; near 0, where 1 - e would cancel,
// by its series.
static SPECDEC_INLINE Vec soft_cap(Vec s, float softcap) {
  const Vec x = s * splat(1.0f / softcap), negated = splat(0.0f) - x, magnitude = maximum(x, negated);
  const Vec e = exp2(magnitude * splat(-2.0f * kLog2E));
  const Vec far = (splat(1.0f) - e) / (splat(1.0f) + e);
  const Vec square = x * x;
  Vec series = fma(square, splat(-8.863235529902197e-3f), splat(2.1869488536155203e-2f));
  series = fma(square, series, splat(-5.396825396825397e-2f));
  series = fma(square, series, splat(1.3333333333333333e-1f));
  series = fma(square, series, splat(-3.333333333333333e-1f));
  const Vec near = fma(x * square, series, x);
  const Vec capped = magnitude < splat(0.35f) ? near : (x < splat(0.0f) ? splat(0.0f) - far : far);
  return capped * splat(softcap);
}

// Elements as they lie in memory.
struct Float32 {
  using Element = float;
  static SPECDEC_INLINE Vec load_vec(const float* p) { return load(p); }
  static SPECDEC_INLINE void store_vec(float* p, Vec v) { store(p, v); }
};
struct BFloat16 {
  using Element = uint16_t;
  static SPECDEC_INLINE Vec load_vec(const uint16_t* p) { return load_bf16(p); }
  static SPECDEC_INLINE void store_vec(uint16_t* p, Vec v) { store_bf16(p, v); }
};
struct Float16 {
  using Element = uint16_t;
  static SPECDEC_INLINE Vec load_vec(const uint16_t* p) { return load_f16(p); }
  static SPECDEC_INLINE void store_vec(uint16_t* p, Vec v) { store_f16(p, v); }
};

}  // namespace specdec::cpu::SPECDEC_ISA

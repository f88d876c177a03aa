// The greatest of many 16-bit floats, found among their bits.
//
// They are compared as integers, 32 or 16 at a time without a conversion. Those that are not negative have the order of
// their bits, and as signed integers they are above all negative ones; a NaN is above infinity in its sign's order. So
// two comparisons a vector are enough where anything is not negative, and else a third one in a second look.
#pragma once

#if defined(__AVX2__)

#include "common/cpu/simd.h"

namespace specdec::cpu::SPECDEC_ISA {

struct Halves {
#if defined(__AVX512F__)
  using Lanes = __m512i;
  static SPECDEC_INLINE Lanes splat_lanes(int x) { return _mm512_set1_epi16(short(x)); }
  static SPECDEC_INLINE Lanes load_lanes(const uint16_t* at) { return _mm512_loadu_si512(at); }
  static SPECDEC_INLINE Lanes larger_signed(Lanes a, Lanes b) { return _mm512_max_epi16(a, b); }
  static SPECDEC_INLINE Lanes larger(Lanes a, Lanes b) { return _mm512_max_epu16(a, b); }
  static SPECDEC_INLINE Lanes lower(Lanes a, Lanes b) { return _mm512_min_epu16(a, b); }
  static SPECDEC_INLINE Lanes flip(Lanes x, int bits) { return _mm512_xor_si512(x, splat_lanes(bits)); }
  static SPECDEC_INLINE __m256i halved(Lanes v) {
    return _mm256_min_epu16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  }
#else
  using Lanes = __m256i;
  static SPECDEC_INLINE Lanes splat_lanes(int x) { return _mm256_set1_epi16(short(x)); }
  static SPECDEC_INLINE Lanes load_lanes(const uint16_t* at) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  }
  static SPECDEC_INLINE Lanes larger_signed(Lanes a, Lanes b) { return _mm256_max_epi16(a, b); }
  static SPECDEC_INLINE Lanes larger(Lanes a, Lanes b) { return _mm256_max_epu16(a, b); }
  static SPECDEC_INLINE Lanes lower(Lanes a, Lanes b) { return _mm256_min_epu16(a, b); }
  static SPECDEC_INLINE Lanes flip(Lanes x, int bits) { return _mm256_xor_si256(x, splat_lanes(bits)); }
  static SPECDEC_INLINE __m256i halved(Lanes v) { return v; }
#endif
  static constexpr int kLanes = sizeof(Lanes) / 2;

  static SPECDEC_INLINE int lowest_of(Lanes v) {
    const __m256i half = halved(v);
    const __m128i least = _mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    return _mm_cvtsi128_si32(_mm_minpos_epu16(least)) & 0xffff;
  }
  static SPECDEC_INLINE int largest_signed_of(Lanes v) { return 0x7fff - lowest_of(flip(v, 0x7fff)); }
  static SPECDEC_INLINE int largest_of(Lanes v) { return 0xffff - lowest_of(flip(v, 0xffff)); }
};

// The bits of the greatest of `count` 16-bit floats, a multiple of 4 * kLanes; false if one of them is a NaN.
static SPECDEC_INLINE bool max_of_halves(const uint16_t* at, int count, int infinity, uint16_t& bits) {
  constexpr int kNegative = 0x8000;
  Halves::Lanes top[4], most[4];
  for (int j = 0; j < 4; j++) {
    top[j] = Halves::splat_lanes(kNegative);
    most[j] = Halves::splat_lanes(0);
  }
  for (int i = 0; i < count; i += 4 * Halves::kLanes) {
    SPECDEC_UNROLL
    for (int j = 0; j < 4; j++) {
      const Halves::Lanes x = Halves::load_lanes(at + i + j * Halves::kLanes);
      top[j] = Halves::larger_signed(top[j], x);
      most[j] = Halves::larger(most[j], x);
    }
  }
  for (int j = 1; j < 4; j++) {
    top[0] = Halves::larger_signed(top[0], top[j]);
    most[0] = Halves::larger(most[0], most[j]);
  }
  const int greatest = Halves::largest_signed_of(top[0]);  // as a signed number
  if (greatest > infinity || Halves::largest_of(most[0]) > (kNegative | infinity)) return false;
  bits = uint16_t(greatest);
  if (greatest >= 0) return true;
  Halves::Lanes least = Halves::splat_lanes(0xffff);  // all are negative: of those the lowest bits
  for (int i = 0; i < count; i += Halves::kLanes) least = Halves::lower(least, Halves::load_lanes(at + i));
  bits = uint16_t(Halves::lowest_of(least));
  return true;
}

}  // namespace specdec::cpu::SPECDEC_ISA

#endif

// Int8 heads times 16-bit hidden rows in exact integers, by AVX-512's dot products of bytes.
//
// A hidden row y becomes integers of 16 bits, scale * (256 * high + low) with both limbs from -128 to 127. vpdpbusd
// multiplies unsigned bytes with signed ones, so the head takes the unsigned side: (w + 128) is w with its top bit
// turned over, and 128 * sum(high), 128 * sum(low) are taken off in the end. No sum can leave 32 bits up to a dim of
// 65,536. Eight dot products of two limbs are sixteen sums, as many as are reduced together; with one hidden row they
// are eight rows of the head. The head is read once, each of those rows from a stream of its own (linear/cpu/weight_streams.h).
#define SPECDEC_ISA avx512_vnni
#include "common/cpu/simd.h"
#include "linear/cpu/product_types.h"
#include "linear/cpu/weight_streams.h"

namespace specdec::cpu::avx512_vnni {

constexpr int kStep = 64;              // bytes of a vector
constexpr int kTogether = 8;           // dot products that are reduced together
constexpr int kMax = 127 * 256 + 127;  // of a limb pair
constexpr int kHeader = 64;            // bytes before the limbs

// The head of a packed row. Then, for every 64 dims, 64 high limbs and 64 low ones, zeros past the dim.
struct Header {
  float scale;
  int32_t high_sum, low_sum;  // times 128
};

struct Rounding {
  float scale;
  double inverse;  // 0 where nothing is left of the row, or it is not finite
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

// What rounds a finite row; a scale of NaN where it is not.
static Rounding rounding_of(const float* y, int dim) {
  Vec most = splat(0.0f);
  __mmask16 finite = 0xffff;
  for (int d = 0; d < dim; d += kWidth) {
    const Vec size = _mm512_abs_ps(load(y + d));
    finite &= _mm512_cmp_ps_mask(size, splat(__builtin_inff()), _CMP_LT_OQ);
    most = _mm512_max_ps(size, most);
  }
  if (finite != 0xffff) return {__builtin_nanf(""), 0.0};
  const float scale = _mm512_reduce_max_ps(most) / kMax;
  return {scale, scale > 0 ? 1.0 / scale : 0.0};
}

size_t packed_bytes(HeadType, int dim) { return kHeader + 2 * size_t(round_up(dim, kStep)); }

void pack(HeadType type, const float* y, int dim, char* packed, int row, int, int) {
  static_assert(kFloatRowStep % kStep == 0, "");
  packed += row * packed_bytes(type, dim);
  const Rounding rounding = rounding_of(y, dim);
  __m512i highs = _mm512_setzero_si512(), lows = highs;
  for (int d = 0; d < round_up(dim, kStep); d += kWidth) {
    const __m512i whole = rounding.inverse > 0 ? rounding.apply(load(y + d)) : _mm512_setzero_si512();
    const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(whole, 24), 24);
    const __m512i high = _mm512_srai_epi32(_mm512_sub_epi32(whole, low), 8);
    char* to = packed + kHeader + d / kStep * (2 * kStep) + d % kStep;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + kStep), _mm512_cvtepi32_epi8(low));
    highs = _mm512_add_epi32(highs, high);
    lows = _mm512_add_epi32(lows, low);
  }
  const Header header = {rounding.scale, 128 * _mm512_reduce_add_epi32(highs), 128 * _mm512_reduce_add_epi32(lows)};
  __builtin_memcpy(packed, &header, sizeof header);
}

double rounding_error(const float* y, int dim) {
  const Rounding rounding = rounding_of(y, dim);
  const __m512d scale = _mm512_set1_pd(rounding.scale);
  __m512d squares = _mm512_setzero_pd();
  for (int d = 0; d < dim; d += kWidth) {
    const __m512i whole = rounding.inverse > 0 ? rounding.apply(load(y + d)) : _mm512_setzero_si512();
    const Vec exact = _mm512_cvtepi32_ps(whole);  // 16 bits
    const __m512d low = Rounding::low_half(load(y + d)) - scale * Rounding::low_half(exact);
    const __m512d high = Rounding::high_half(load(y + d)) - scale * Rounding::high_half(exact);
    squares = squares + low * low + high * high;
  }
  return __builtin_sqrt(_mm512_reduce_add_pd(squares));
}

// Lane i of the result is the sum of the lanes of vector i.
static SPECDEC_INLINE __m512i integer_sums(const __m512i (&v)[16]) {
  __m512i t[8], u[4];
  SPECDEC_UNROLL
  for (int i = 0; i < 8; i++) {
    t[i] =
        _mm512_add_epi32(_mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]));
  }
  SPECDEC_UNROLL
  for (int i = 0; i < 4; i++) {
    u[i] =
        _mm512_add_epi32(_mm512_unpacklo_epi64(t[2 * i], t[2 * i + 1]), _mm512_unpackhi_epi64(t[2 * i], t[2 * i + 1]));
  }
  const __m512i low = _mm512_add_epi32(_mm512_shuffle_i32x4(u[0], u[1], 0x44), _mm512_shuffle_i32x4(u[0], u[1], 0xee));
  const __m512i high = _mm512_add_epi32(_mm512_shuffle_i32x4(u[2], u[3], 0x44), _mm512_shuffle_i32x4(u[2], u[3], 0xee));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(low, high, 0x88), _mm512_shuffle_i32x4(low, high, 0xdd));
}

// Adds the products of kStep dims, from d on; those outside the mask are not read.
template <int kRows>
static SPECDEC_INLINE void add_step(const int8_t* const (&head)[kTogether / kRows], const int8_t* const (&limbs)[kRows],
                                    int d, __mmask64 inside, __m512i (&sum)[2 * kTogether]) {
  const __m512i flip = _mm512_set1_epi8(-128);
  __m512i high[kRows], low[kRows];
  SPECDEC_UNROLL
  for (int n = 0; n < kRows; n++) {
    high[n] = _mm512_loadu_si512(limbs[n] + 2 * d);
    low[n] = _mm512_loadu_si512(limbs[n] + 2 * d + kStep);
  }
  SPECDEC_UNROLL
  for (int k = 0; k < kTogether / kRows; k++) {
    const auto* at = head[k] + d;
    const bool whole = inside == ~__mmask64(0);
    const __m512i row = _mm512_xor_si512(whole ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi8(inside, at), flip);
    SPECDEC_UNROLL
    for (int n = 0; n < kRows; n++) {
      const int i = n * (kTogether / kRows) + k;
      sum[i] = _mm512_dpbusd_epi32(sum[i], row, high[n]);
      sum[kTogether + i] = _mm512_dpbusd_epi32(sum[kTogether + i], row, low[n]);
    }
  }
}

// 8 / kRows rows of the head times kRows hidden rows: lane row * slots + slot, the low limbs 8 lanes further. `ahead`
// bytes from here are fetched, unless it is 0.
template <int kRows>
static SPECDEC_INLINE __m512i dots(const int8_t* const (&head)[kTogether / kRows], const int8_t* const (&limbs)[kRows],
                                   int dim, int64_t ahead) {
  __m512i sum[2 * kTogether];
  SPECDEC_UNROLL
  for (int i = 0; i < 2 * kTogether; i++) sum[i] = _mm512_setzero_si512();
  int d = 0;
  for (; d + kStep <= dim; d += kStep) {
    SPECDEC_UNROLL
    for (int k = 0; k < kTogether / kRows; k++) {
      if (ahead) __builtin_prefetch(head[k] + d + ahead, 0, 2);
    }
    add_step<kRows>(head, limbs, d, ~__mmask64(0), sum);
  }
  if (d < dim) add_step<kRows>(head, limbs, d, (__mmask64(1) << (dim - d)) - 1, sum);
  return integer_sums(sum);
}

// What makes logits of sums in the lanes of `dots`.
struct Finish {
  __m512i too_much;
  __m256 scales;
};

template <int kRows>
static Finish finish_of(const char* packed, int64_t stride, int rows) {
  alignas(64) int32_t too_much[2 * kTogether];
  alignas(32) float scales[kTogether];
  for (int lane = 0; lane < kTogether; lane++) {
    Header header;
    __builtin_memcpy(&header, packed + min_of(lane / (kTogether / kRows), rows - 1) * stride, sizeof header);
    too_much[lane] = header.high_sum;
    too_much[kTogether + lane] = header.low_sum;
    scales[lane] = header.scale;
  }
  return {_mm512_load_si512(too_much), _mm256_load_ps(scales)};
}

template <int kRows>
static void multiply_rows(const WeightTile& tile, const char* packed, int64_t stride, int rows, int call_rows,
                          bool fetch, float* logits) {
  constexpr int kSlots = kTogether / kRows;
  const Finish finish = finish_of<kRows>(packed, stride, rows);
  const int8_t *head[kSlots], *limbs[kRows];
  for (int n = 0; n < kRows; n++) {
    limbs[n] = reinterpret_cast<const int8_t*>(packed + min_of(n, rows - 1) * stride + kHeader);
  }
  const HeadStreams<kSlots> streams(tile, tile.dim, call_rows);
  for (int place = 0; place < streams.places(); place++) {
    for (int k = 0; k < kSlots; k++) {
      const int at = streams.row(k, place);
      head[k] = static_cast<const int8_t*>(tile.weights) + int64_t(tile.entries ? tile.entries[at] : at) * tile.dim;
    }
    const __m512i sums = dots<kRows>(head, limbs, tile.dim, fetch ? int64_t(streams.ahead(place)) * tile.dim : 0);
    const __m512 parts = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, finish.too_much));
    const __m256 high = _mm512_castps512_ps256(parts), low = _mm512_extractf32x8_ps(parts, 1);
    const __m256 products = _mm256_mul_ps(_mm256_fmadd_ps(_mm256_set1_ps(256.0f), high, low), finish.scales);
    alignas(32) float by_row[kRows][kSlots];
    _mm256_store_ps(by_row[0], products);
    for (int n = 0; n < rows; n++) streams.put(by_row[n], place, logits + n * kWeightTile, false);
  }
}

void multiply(HeadType, const WeightTile& tile, const char* packed, int rows, int call_rows, float* logits) {
  const int64_t stride = int64_t(packed_bytes(HeadType::kInt8, tile.dim));
  for (int row = 0; row < rows; row += 4) {  // the tile stays in the second-level cache
    const int some = min_of(4, rows - row);
    const bool fetch = row == 0 && !tile.entries;
    const char* from = packed + row * stride;
    float* to = logits + row * kWeightTile;
    if (some == 1) multiply_rows<1>(tile, from, stride, 1, call_rows, fetch, to);
    if (some == 2) multiply_rows<2>(tile, from, stride, 2, call_rows, fetch, to);
    if (some > 2) multiply_rows<4>(tile, from, stride, some, call_rows, fetch, to);
  }
}

}  // namespace specdec::cpu::avx512_vnni

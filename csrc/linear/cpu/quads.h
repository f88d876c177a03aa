// Products of a bfloat16 head with more than a few hidden rows, for AVX-512's dot products of pairs.
//
// A vector holds eight dims of four hidden rows, a quad, which is packed so once; eight dims of one of the head's rows
// are broadcast to all four as they lie in memory. So an accumulator has four sums for each of four logits, where 32
// dims of one hidden row would give sixteen sums for one logit: a quarter of the vectors is left to reduce, and eight
// rows of the head times three quads are 24 products for 11 loads. On Zen 4 this runs at 94 % of the peak of those
// products with 4,096 dims and at 91 % with 768.
//
// Eight rows of the head, each from a stream of its own (linear/cpu/weight_streams.h), are multiplied with all quads while they
// are near, and the next ones are fetched meanwhile; quads come from the second-level cache. Up to three are packed
// with their steps in turn, so that a group is one stream of memory. The dim is cut where not all quads would fit into
// that cache.
#pragma once

#include "common/cpu/simd.h"
#include "linear/cpu/product_types.h"
#include "linear/cpu/weight_streams.h"

namespace specdec::cpu::SPECDEC_ISA {

constexpr int kQuadDims = 8;      // of a row in a vector
constexpr int kQuadVector = 32;   // elements: that of four rows
constexpr int kQuadGroup = 3;     // quads that are packed and multiplied together
constexpr int kQuadSlots = 8;     // with so many rows of the head
constexpr int kQuadBlock = 4096;  // dims, where they are cut
constexpr int kLineDims = 32;     // of a row of the head in a cache line
constexpr int kQuadRows = 4 * kQuadGroup;
static_assert(kRowBlock % kQuadRows == 0 && kWeightTile % kQuadSlots == 0 && kWidth == 2 * kQuadDims, "");

// One quad alone is 9 loads for 8 products, so it only pays where four rows would not stay in the first-level cache.
static SPECDEC_INLINE bool takes_quads(HeadType type, int dim, int call_rows) {
  return type == HeadType::kBFloat16 && (call_rows > 4 || (call_rows > 2 && dim > 2048));
}

// Of `rows` packed rows, those of the group that begins at `first`, in quads.
static SPECDEC_INLINE int quads_of(int first, int rows) { return (min_of(kQuadRows, rows - first) + 3) / 4; }

// `stride` is the elements of a packed row, whole vectors.
static void pack_quads(const float* y, int dim, int stride, uint16_t* packed, int row, int rows) {
  const int first = row / kQuadRows * kQuadRows, quads = quads_of(first, rows), quad = (row - first) / 4;
  uint16_t* to = packed + int64_t(first) * stride + quad * kQuadVector + row % 4 * kQuadDims;
  const int next = quads * kQuadVector;
  for (int d = 0; d < dim; d += kWidth, to += 2 * next) {
    uint16_t rounded[2][kQuadDims];
    store_bf16(rounded[0], load(y + d));
    __builtin_memcpy(to, rounded[0], sizeof(rounded[0]));
    if (d + kQuadDims < dim) __builtin_memcpy(to + next, rounded[1], sizeof(rounded[1]));
  }
}

using QuadHead = HeadGroup<uint16_t, kQuadSlots, kQuadDims>;

// Adds the products of eight dims, d and the next ones, whose quads are at `hidden`.
template <int kQuads>
static SPECDEC_INLINE void add_step(const uint16_t* const (&head)[kQuadSlots], int d, const uint16_t* hidden,
                                    Vec (&sum)[kQuadSlots][kQuads]) {
  __m512bh quad[kQuads];
  SPECDEC_UNROLL
  for (int q = 0; q < kQuads; q++) quad[q] = (__m512bh)_mm512_loadu_si512(hidden + q * kQuadVector);
  SPECDEC_UNROLL
  for (int k = 0; k < kQuadSlots; k++) {
    const __m128i dims = _mm_loadu_si128(reinterpret_cast<const __m128i*>(head[k] + d));
    const auto row = (__m512bh)_mm512_broadcast_i32x4(dims);
    SPECDEC_UNROLL
    for (int q = 0; q < kQuads; q++) sum[k][q] = _mm512_dpbf16_ps(sum[k][q], row, quad[q]);
  }
}

// The four sums of each logit become one: four rows of the head for each of the quad's rows.
static SPECDEC_INLINE Vec sums_of_four(Vec a, Vec b, Vec c, Vec d) {
  const Vec low = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  const Vec high = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
  const __m512d x = _mm512_castps_pd(low), y = _mm512_castps_pd(high);
  return _mm512_castpd_ps(_mm512_unpacklo_pd(x, y)) + _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
}

// Eight rows of the head times a group of quads with `rows` rows, over dims [begin, end).
template <int kQuads, bool kFetch>
static SPECDEC_INLINE void multiply_group(const QuadHead& head, const HeadStreams<kQuadSlots>& streams, int place,
                                          const uint16_t* group, int rows, int begin, int end, float* logits) {
  Vec sum[kQuadSlots][kQuads];
  SPECDEC_UNROLL
  for (int k = 0; k < kQuadSlots; k++) {
    SPECDEC_UNROLL
    for (int q = 0; q < kQuads; q++) sum[k][q] = splat(0.0f);
  }
  constexpr int kStep = kQuads * kQuadVector;  // of the hidden rows, for eight dims
  const int whole = min_of(end, head.whole);
  const uint16_t* hidden = group + int64_t(begin) * (kStep / kQuadDims);
  int d = begin;
  for (; d + kLineDims <= whole; d += kLineDims, hidden += kLineDims / kQuadDims * kStep) {
    SPECDEC_UNROLL
    for (int k = 0; kFetch && k < kQuadSlots; k++) __builtin_prefetch(head.row[k] + d + head.ahead, 0, 2);
    SPECDEC_UNROLL
    for (int i = 0; i < kLineDims / kQuadDims; i++) {
      add_step(head.row, d + i * kQuadDims, hidden + i * kStep, sum);
    }
  }
  for (; d < whole; d += kQuadDims, hidden += kStep) add_step(head.row, d, hidden, sum);
  if (d < end) add_step(head.rest, d, hidden, sum);
  SPECDEC_UNROLL
  for (int q = 0; q < kQuads; q++) {
    alignas(64) float of_slots[2][kWidth];
    store(of_slots[0], sums_of_four(sum[0][q], sum[1][q], sum[2][q], sum[3][q]));
    store(of_slots[1], sums_of_four(sum[4][q], sum[5][q], sum[6][q], sum[7][q]));
    for (int n = 0; n < min_of(4, rows - 4 * q); n++) {
      alignas(32) float by_slot[kQuadSlots];
      _mm_store_ps(by_slot, _mm_load_ps(of_slots[0] + 4 * n));
      _mm_store_ps(by_slot + 4, _mm_load_ps(of_slots[1] + 4 * n));
      streams.put(by_slot, place, logits + (4 * q + n) * kWeightTile, begin > 0);
    }
  }
}

template <bool kFetch>
static void multiply_some(const QuadHead& head, const HeadStreams<kQuadSlots>& streams, int place,
                          const uint16_t* group, int rows, int begin, int end, float* logits) {
  const int quads = quads_of(0, rows);
  if (quads == 1) multiply_group<1, kFetch>(head, streams, place, group, rows, begin, end, logits);
  if (quads == 2) multiply_group<2, kFetch>(head, streams, place, group, rows, begin, end, logits);
  if (quads == 3) multiply_group<3, kFetch>(head, streams, place, group, rows, begin, end, logits);
}

static void multiply_quads(const WeightTile& tile, const uint16_t* packed, int stride, int rows, int call_rows,
                           float* logits) {
  const HeadStreams<kQuadSlots> streams(tile, 2 * tile.dim, call_rows);
  for (int begin = 0; begin < tile.dim; begin += kQuadBlock) {
    const int end = min_of(begin + kQuadBlock, tile.dim);
    for (int place = 0; place < streams.places(); place++) {
      const QuadHead head(tile, streams, place);
      for (int first = 0; first < rows; first += kQuadRows) {
        const int some = min_of(kQuadRows, rows - first);
        const uint16_t* group = packed + int64_t(first) * stride;
        float* to = logits + first * kWeightTile;
        if (first == 0 && !tile.entries) {
          multiply_some<true>(head, streams, place, group, some, begin, end, to);
        } else {
          multiply_some<false>(head, streams, place, group, some, begin, end, to);
        }
      }
    }
  }
}

}  // namespace specdec::cpu::SPECDEC_ISA

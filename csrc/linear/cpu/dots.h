// Dot products of rows of the head with hidden rows, along the dim, for every element type and number of rows.
//
// Up to kWidth dot products are summed at once, in as many accumulators as a vector has lanes, and reduced together:
// those of eight rows of the head with one hidden row, or of a quarter as many rows as there are lanes with four. Each
// row of the head comes from a stream of its own (linear/cpu/weight_streams.h), in the first pass over the hidden rows, and from
// the first-level cache in the following ones; hidden rows come from the second. They are packed in groups of four
// whose steps alternate, so that a group is one stream of memory, which the hardware fetches ahead of use, and rows
// that are a power of two apart do not fight for the same sets of a cache. With few hidden rows every row of the head
// is read from its beginning to its end. With more, the dim is cut where a group's rows would not fit in the
// first-level cache.
//
// The order of a dot product's sum depends on the dim and on the number of rows of the call alone.
#pragma once

#include "common/cpu/simd.h"
#include "linear/cpu/product_types.h"
#include "linear/cpu/weight_streams.h"

namespace specdec::cpu::SPECDEC_ISA {

// 32-bit floats times elements that are widened to them.
template <class Storage>
struct Widened {
  using Element = typename Storage::Element;
  using Hidden = float;
  using Operand = Vec;
  static constexpr int kStep = kWidth;
  static SPECDEC_INLINE Operand load_head(const Element* at) { return Storage::load_vec(at); }
  static SPECDEC_INLINE Operand load_hidden(const Hidden* at) { return load(at); }
  static SPECDEC_INLINE Vec apply(Vec sum, Operand head, Operand hidden) { return fma(head, hidden, sum); }
  static SPECDEC_INLINE void pack(const float* y, Hidden* to) { store(to, load(y)); }
  static void round(float*, int) {}
};

struct Int8 {
  using Element = int8_t;
  static SPECDEC_INLINE Vec load_vec(const int8_t* at) {
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
#elif defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at))));
#else
    Vec v;
    for (int i = 0; i < kWidth; i++) v[i] = float(at[i]);
    return v;
#endif
  }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16. Hidden rows are rounded to it, as PyTorch does before such a head.
struct BFloat16Pairs {
  using Element = uint16_t;
  using Hidden = uint16_t;
  using Operand = __m512bh;
  static constexpr int kStep = 2 * kWidth;
  static SPECDEC_INLINE Operand load_head(const Element* at) { return (__m512bh)_mm512_loadu_si512(at); }
  static SPECDEC_INLINE Operand load_hidden(const Hidden* at) { return (__m512bh)_mm512_loadu_si512(at); }
  static SPECDEC_INLINE Vec apply(Vec sum, Operand head, Operand hidden) { return _mm512_dpbf16_ps(sum, head, hidden); }
  static SPECDEC_INLINE void pack(const float* y, Hidden* to) {
    store_bf16(to, load(y));
    store_bf16(to + kWidth, load(y + kWidth));
  }
  static void round(float* y, int dim) {
    for (int d = 0; d < dim; d += kWidth) {
      uint16_t rounded[kWidth];
      store_bf16(rounded, load(y + d));
      store(y + d, load_bf16(rounded));
    }
  }
};
using HeadBFloat16 = BFloat16Pairs;
#else
using HeadBFloat16 = Widened<BFloat16>;
#endif

template <class Function>
static SPECDEC_INLINE auto with_head(HeadType type, const Function& function) {
  switch (type) {
    case HeadType::kFloat32:
      return function(Widened<Float32>());
    case HeadType::kBFloat16:
      return function(HeadBFloat16());
    case HeadType::kFloat16:
      return function(Widened<Float16>());
    default:
      return function(Widened<Int8>());
  }
}

// Elements of a packed row: whole steps, and whole cache lines.
template <class Multiplier>
static SPECDEC_INLINE int packed_dim(int dim) {
  constexpr int kLine = 64 / int(sizeof(typename Multiplier::Hidden));
  return round_up(dim, max_of(kLine, Multiplier::kStep));
}

constexpr int kNarrowRows = 8;            // up to here memory is what all wait for, and the dim is not cut
constexpr int kTogether = kRowsTogether;  // hidden rows that are packed and multiplied together
constexpr int kBlockBytes = 8192;         // of a head's row, where the dim is cut
constexpr int kFloat32Block = 512;  // elements: longer sums of float32 products would round more than PyTorch's do

// Products of kSlots rows of the head with kRows packed hidden rows, summed over dims [begin, end), whole steps.
// `ahead` elements from here are fetched where kFetch says so.
template <class Multiplier, int kSlots, int kRows, bool kFetch>
static SPECDEC_INLINE void add_products(const typename Multiplier::Element* const (&head)[kSlots],
                                        const typename Multiplier::Hidden* hidden, int begin, int end, int64_t ahead,
                                        Vec (&sum)[kSlots][kRows]) {
  SPECDEC_UNROLL
  for (int k = 0; k < kSlots; k++) {
    SPECDEC_UNROLL
    for (int n = 0; n < kRows; n++) sum[k][n] = splat(0.0f);
  }
  for (int d = begin; d < end; d += Multiplier::kStep) {
    typename Multiplier::Operand rows[kRows];
    SPECDEC_UNROLL
    for (int n = 0; n < kRows; n++) rows[n] = Multiplier::load_hidden(hidden + d * kRows + n * Multiplier::kStep);
    SPECDEC_UNROLL
    for (int k = 0; k < kSlots; k++) {
      if (kFetch) __builtin_prefetch(head[k] + d + ahead, 0, 2);
      const auto row = Multiplier::load_head(head[k] + d);
      SPECDEC_UNROLL
      for (int n = 0; n < kRows; n++) sum[k][n] = Multiplier::apply(sum[k][n], row, rows[n]);
    }
  }
}

// The same, each summed to a lane: row * kSlots + slot.
template <class Multiplier, int kSlots, int kRows, bool kFetch>
static SPECDEC_INLINE Vec dots(const typename Multiplier::Element* const (&head)[kSlots],
                               const typename Multiplier::Hidden* hidden, int begin, int end, int64_t ahead) {
  const int block = sizeof(*head[0]) == 4 ? kFloat32Block : end - begin;
  Vec sum[kSlots][kRows];
  add_products<Multiplier, kSlots, kRows, kFetch>(head, hidden, begin, min_of(begin + block, end), ahead, sum);
  for (int at = begin + block; at < end; at += block) {
    Vec part[kSlots][kRows];
    add_products<Multiplier, kSlots, kRows, kFetch>(head, hidden, at, min_of(at + block, end), ahead, part);
    SPECDEC_UNROLL
    for (int k = 0; k < kSlots; k++) {
      SPECDEC_UNROLL
      for (int n = 0; n < kRows; n++) sum[k][n] = sum[k][n] + part[k][n];
    }
  }
  Vec all[kWidth];
  SPECDEC_UNROLL
  for (int i = 0; i < kWidth; i++) {
    const int n = i / kSlots;
    all[i] = n < kRows ? sum[i % kSlots][n < kRows ? n : 0] : splat(0.0f);
  }
  return sums(all);
}

// A group of the head times one of hidden rows over a part of the dim: lanes as above.
template <class Multiplier, int kSlots>
using DotGroup = HeadGroup<typename Multiplier::Element, kSlots, Multiplier::kStep>;

template <class Multiplier, int kSlots, int kRows, bool kFetch>
static SPECDEC_INLINE Vec dots_of_group(const DotGroup<Multiplier, kSlots>& head,
                                        const typename Multiplier::Hidden* hidden, int begin, int end) {
  const int whole = min_of(end, head.whole);
  Vec sum = splat(0.0f);
  if (begin < whole) sum = dots<Multiplier, kSlots, kRows, kFetch>(head.row, hidden, begin, whole, head.ahead);
  if (whole < end) sum = sum + dots<Multiplier, kSlots, kRows, false>(head.rest, hidden, whole, end, 0);
  return sum;
}

template <class Multiplier, int kSlots, bool kFetch>
static SPECDEC_INLINE Vec dots_of_rows(const DotGroup<Multiplier, kSlots>& head,
                                       const typename Multiplier::Hidden* hidden, int rows, int begin, int end) {
  constexpr int kMax = min_of(kTogether, kWidth / kSlots);
  if (rows == 1) return dots_of_group<Multiplier, kSlots, 1, kFetch>(head, hidden, begin, end);
  if (rows == 2) return dots_of_group<Multiplier, kSlots, min_of(2, kMax), kFetch>(head, hidden, begin, end);
  if (rows == 3) return dots_of_group<Multiplier, kSlots, min_of(3, kMax), kFetch>(head, hidden, begin, end);
  return dots_of_group<Multiplier, kSlots, kMax, kFetch>(head, hidden, begin, end);
}

// Up to kWidth / kSlots hidden rows, or any number where that is kTogether.
template <class Multiplier, int kSlots>
static void multiply_tile(const WeightTile& tile, const typename Multiplier::Hidden* hidden, int rows, int call_rows,
                          float* logits) {
  constexpr int kSize = int(sizeof(typename Multiplier::Element));
  const HeadStreams<kSlots> streams(tile, tile.dim * kSize, call_rows);
  const int64_t stride = packed_dim<Multiplier>(tile.dim);
  const int block = call_rows <= kNarrowRows ? tile.dim : kSize == 4 ? kFloat32Block : kBlockBytes / kSize;
  for (int begin = 0; begin < tile.dim; begin += block) {
    const int end = min_of(begin + block, tile.dim);
    for (int place = 0; place < streams.places(); place++) {
      const DotGroup<Multiplier, kSlots> head(tile, streams, place);
      for (int row = 0; row < rows; row += kTogether) {
        const int some = min_of(kTogether, rows - row);
        const auto* group = hidden + row * stride;
        alignas(64) float by_row[kWidth / kSlots][kSlots];
        store(by_row[0], row == 0 && !tile.entries
                             ? dots_of_rows<Multiplier, kSlots, true>(head, group, some, begin, end)
                             : dots_of_rows<Multiplier, kSlots, false>(head, group, some, begin, end));
        for (int n = 0; n < some; n++) streams.put(by_row[n], place, logits + (row + n) * kWeightTile, begin > 0);
      }
    }
  }
}

// The more streams of the head, the fewer hidden rows: as many products as a vector has lanes.
template <class Multiplier>
static void multiply_rows(const WeightTile& tile, const char* packed, int rows, int call_rows, float* logits) {
  const auto* hidden = reinterpret_cast<const typename Multiplier::Hidden*>(packed);
  if (rows == 1) return multiply_tile<Multiplier, 8>(tile, hidden, rows, call_rows, logits);
  if (rows == 2) return multiply_tile<Multiplier, kWidth / 2>(tile, hidden, rows, call_rows, logits);
  multiply_tile<Multiplier, kWidth / 4>(tile, hidden, rows, call_rows, logits);
}

}  // namespace specdec::cpu::SPECDEC_ISA

// The two products of path-invariant attention: scores, and sums of weighted values.
//
// A score is a dot product with the dims in the lanes and one fixed sum over the lanes (`sums` in common/cpu/simd.h).
// An output is one chain of multiply-adds in the order of the positions, with the dims in the lanes. Blocks of rows and
// slots share loads and shuffles, and nothing else: what a row gets is the same in a block of any size. Many rows may
// even lie in the lanes instead, since what were lanes can be accumulators. So one row and sixty-four rows do the same
// arithmetic.
//
// An Arithmetic says what is multiplied: PathFloats makes float32 of everything, PathPairs takes bfloat16 two at a
// time. Each has operands as they lie in the cache (Direct), and as they are packed once for many rows (PackedKeys,
// PackedValues).
#pragma once

#include "common/cpu/simd.h"

namespace specdec::cpu::SPECDEC_ISA {

// 32 bits of memory: one float, or a pair of bfloat16, which may lie at any even address.
using Word = float __attribute__((may_alias, aligned(2)));

constexpr int kScoreStride = 256 + 16;  // floats from row to row of scores: a chunk, and what the last block overshoots

// One number to a lane.
template <class StorageType>
struct FloatOperand {
  using Element = typename StorageType::Element;
  static constexpr int kDims = kWidth, kPositions = 1, kLeastVecs = 1;

  static SPECDEC_INLINE Vec key(const Element* row, int d, int) { return StorageType::load_vec(row + d); }
  static SPECDEC_INLINE Vec multiply(Vec sum, Vec a, Vec b) { return fma(a, b, sum); }

  static SPECDEC_INLINE Vec weight(const float* w, int i) { return splat(w[i]); }
  template <int kVecs>
  static SPECDEC_INLINE void values(const Element* const* rows, int i, int d, int, Vec (&v)[kVecs]) {
    SPECDEC_UNROLL
    for (int j = 0; j < kVecs; j++) v[j] = StorageType::load_vec(rows[i] + d + j * kWidth);
  }
};

template <class StorageType>
struct PathFloats {
  using Storage = StorageType;
  using Element = typename Storage::Element;
  using Direct = FloatOperand<Storage>;
  using PackedKeys = FloatOperand<Float32>;
  using PackedValues = FloatOperand<Float32>;
  static constexpr int kPairs = 1;
  static SPECDEC_INLINE int depth(int dim) { return dim; }
  static SPECDEC_INLINE Vec weigh(Vec x) { return exp2(x); }

  static void pack_query(const Element* row, int dim, float* to) {
    for (int d = 0; d < dim; d += kWidth) store(to + d, Storage::load_vec(row + d));
  }
  static void pack_keys(const Element* const* rows, int count, int dim, float* to, const float** packed) {
    for (int i = 0; i < count; i++) {
      packed[i] = to + size_t(i) * dim;
      for (int d = 0; d < dim; d += kWidth) store(to + size_t(i) * dim + d, Storage::load_vec(rows[i] + d));
    }
  }
  static void pack_values(const Element* const* rows, int count, int dim, float* to, const float** packed) {
    pack_keys(rows, count, dim, to, packed);
  }

  // kWidth dims of an output from dim d on.
  static SPECDEC_INLINE Vec read(const float* out, int d) { return load(out + d); }
  static SPECDEC_INLINE void store_weights(float*, int i, float* s, Vec first, Vec second) {
    store(s + i, first);
    store(s + i + kWidth, second);
  }
};

#if defined(__AVX512BF16__)

// Two numbers to a lane. Values are pairs of neighbouring positions, which leaves the dims in the order that
// interleaving gives: of every 32, the first vector holds those whose bit 2 is clear and the second one the others.
// With kInterleaved they have been brought into it before, and row i is that of positions i and i + 1.
template <bool kInterleaved>
struct PairOperand {
  using Element = uint16_t;
  static constexpr int kDims = 32, kPositions = 2, kLeastVecs = 2;

  // 32 elements of a row from dim d on; those past the end are 0 and not read.
  static SPECDEC_INLINE __m512i elements(const Element* row, int d, int dim) {
    if (d + 32 <= dim) return _mm512_loadu_si512(row + d);
    return _mm512_maskz_loadu_epi32(__mmask16((1u << ((dim - d) / 2)) - 1), row + d);
  }
  static SPECDEC_INLINE Vec key(const Element* row, int d, int dim) { return (Vec)elements(row, d, dim); }
  static SPECDEC_INLINE Vec multiply(Vec sum, Vec a, Vec b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

  static SPECDEC_INLINE Vec weight(const float* w, int i) { return splat(reinterpret_cast<const Word*>(w)[i / 2]); }
  template <int kVecs>
  static SPECDEC_INLINE void values(const Element* const* rows, int i, int d, int dim, Vec (&v)[kVecs]) {
    SPECDEC_UNROLL
    for (int j = 0; j < kVecs; j += 2) {
      if constexpr (kInterleaved) {
        const float* at = reinterpret_cast<const float*>(rows[i]) + d + j * kWidth;
        v[j] = load(at);
        v[j + 1] = load(at + kWidth);
      } else {
        const __m512i a = elements(rows[i], d + j * kWidth, dim), b = elements(rows[i + 1], d + j * kWidth, dim);
        v[j] = (Vec)_mm512_unpacklo_epi16(a, b);
        v[j + 1] = (Vec)_mm512_unpackhi_epi16(a, b);
      }
    }
  }
};

struct PathPairs {
  using Storage = BFloat16;
  using Element = uint16_t;
  using Direct = PairOperand<false>;
  using PackedKeys = PairOperand<false>;
  using PackedValues = PairOperand<true>;
  static constexpr int kPairs = 2;
  static SPECDEC_INLINE int depth(int dim) { return round_up(dim, 32); }
  static SPECDEC_INLINE Vec weigh(Vec x) { return exp2_bf16(x); }

  static void pack_query(const Element* row, int dim, float* to) {
    for (int d = 0; d < dim; d += 32) store(to + d / 2, (Vec)Direct::elements(row, d, dim));
  }
  static void pack_keys(const Element* const* rows, int count, int dim, float* to, const Element** packed) {
    const int depth_words = depth(dim) / 2;
    for (int i = 0; i < count; i++) {
      float* at = to + size_t(i) * depth_words;
      packed[i] = reinterpret_cast<const Element*>(at);
      pack_query(rows[i], dim, at);
    }
  }
  static void pack_values(const Element* const* rows, int count, int dim, float* to, const Element** packed) {
    for (int i = 0; i < count; i += 2) {
      float* at = to + size_t(i) / 2 * depth(dim);
      packed[i] = packed[i + 1] = reinterpret_cast<const Element*>(at);
      for (int d = 0; d < dim; d += 32) {
        Vec v[2];
        Direct::values<2>(rows, i, d, dim, v);
        store(at + d, v[0]);
        store(at + d + kWidth, v[1]);
      }
    }
  }

  static SPECDEC_INLINE Vec read(const float* out, int d) {
    // Quarters of four dims: 0, 2, 4, 6 in the first vector, 1, 3, 5, 7 in the second.
    const __m512i first_half = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i second_half = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
    const float* at = out + d / 32 * 32;
    return _mm512_permutex2var_ps(load(at), d % 32 == 0 ? first_half : second_half, load(at + kWidth));
  }
  static SPECDEC_INLINE void store_weights(float* row, int i, float*, Vec first, Vec second) {
    _mm512_storeu_si512(row + i / 2, (__m512i)_mm512_cvtne2ps_pbh(second, first));
  }
};

#endif

// What to fetch ahead while something else is multiplied.
struct PathFetch {
  const char* base = nullptr;
  const int64_t* offsets = nullptr;  // bytes
  int count = 0, bytes = 0;

  SPECDEC_INLINE void part(int i, int parts) const {
    if (count == 0) return;
    for (int n = count * i / parts; n < count * (i + 1) / parts; n++)
      for (int b = 0; b < bytes; b += 64) __builtin_prefetch(base + offsets[n] + b, 0, 2);
  }
};

// s [row][slot] of kRows rows and `count` keys; up to kWidth - 1 numbers behind them are written, too, and as many
// entries of `keys` behind them are read.
template <class Operand, int kRows>
static __attribute__((noinline)) void score_rows(const typename Operand::Element* const* keys, int count, int dim,
                                                 const float* q, int depth, float* s, const PathFetch& fetch) {
  constexpr int kSlots = kWidth / (kRows == 3 ? 4 : kRows), kPairs = Operand::kPositions;
  for (int i = 0; i < count; i += kSlots) {
    fetch.part(i / kSlots, (count + kSlots - 1) / kSlots);
    Vec acc[kWidth];
    SPECDEC_UNROLL
    for (int n = 0; n < kWidth; n++) acc[n] = splat(0.0f);
    for (int d = 0; d < dim; d += Operand::kDims) {
      Vec query[kRows];
      SPECDEC_UNROLL
      for (int r = 0; r < kRows; r++) query[r] = load(q + r * depth + d / kPairs);
      SPECDEC_UNROLL
      for (int k = 0; k < kSlots; k++) {
        const Vec key = Operand::key(keys[i + k], d, dim);
        SPECDEC_UNROLL
        for (int r = 0; r < kRows; r++) acc[r * kSlots + k] = Operand::multiply(acc[r * kSlots + k], key, query[r]);
      }
    }
    alignas(64) float dots[kWidth];
    store(dots, sums(acc));
    SPECDEC_UNROLL
    for (int r = 0; r < kRows; r++) std::memcpy(s + r * kScoreStride + i, dots + r * kSlots, kSlots * sizeof(float));
  }
}

#if defined(__AVX512F__)

// The same scores with the rows in the lanes, which needs no shuffles: for kVecs vectors of rows and kSlots slots. A
// lane of score_rows becomes an accumulator of its own, and these are added as `sums` adds lanes: (0 + 2) + (1 + 3) of
// every four, then of the four sums. Keys are packed, `stride` words apart; q is [kVecs][depth][kWidth].
template <class Operand, int kSlots, int kVecs>
static SPECDEC_INLINE void score_lanes(const Word* keys, int stride, const float* q, int depth, float* to) {
  Vec halves[2][kSlots][kVecs], four[kSlots][kVecs];
  SPECDEC_UNROLL
  for (int part = 0; part < 8; part++) {
    const int quarter = part / 2 == 1 ? 2 : (part / 2 == 2 ? 1 : part / 2);  // 0, 2, 1, 3
    Vec acc[2][kSlots][kVecs];
    SPECDEC_UNROLL
    for (int n = 0; n < 2 * kSlots * kVecs; n++) acc[n / kVecs / kSlots][n / kVecs % kSlots][n % kVecs] = splat(0.0f);
    for (int d = 4 * quarter + part % 2; d < depth; d += kWidth) {
      SPECDEC_UNROLL
      for (int lane = 0; lane < 2; lane++) {
        Vec column[kVecs];
        SPECDEC_UNROLL
        for (int j = 0; j < kVecs; j++) column[j] = load(q + (j * depth + d + 2 * lane) * kWidth);
        SPECDEC_UNROLL
        for (int i = 0; i < kSlots; i++) {
          const Vec key = splat(keys[i * stride + d + 2 * lane]);
          SPECDEC_UNROLL
          for (int j = 0; j < kVecs; j++) acc[lane][i][j] = Operand::multiply(acc[lane][i][j], key, column[j]);
        }
      }
    }
    SPECDEC_UNROLL
    for (int n = 0; n < kSlots * kVecs; n++) {
      const int i = n / kVecs, j = n % kVecs;
      const Vec two = acc[0][i][j] + acc[1][i][j];
      if (part % 2 == 0) four[i][j] = two;
      if (part % 2 == 1) four[i][j] = four[i][j] + two;
      if (part % 4 == 1) halves[part / 4][i][j] = four[i][j];
      if (part % 4 == 3) halves[part / 4][i][j] = halves[part / 4][i][j] + four[i][j];
    }
  }
  SPECDEC_UNROLL
  for (int n = 0; n < kSlots * kVecs; n++) {
    const int i = n / kVecs, j = n % kVecs;
    store(to + (j * kWidth + i) * kWidth, halves[0][i][j] + halves[1][i][j]);
  }
}

// s [row][slot] of `rows` rows, of kVecs vectors, and `count` keys; up to kWidth - 1 numbers behind them are written,
// too, and as many keys behind them are read.
template <class Operand, int kVecs>
static __attribute__((noinline)) void score_lane_rows(const Word* keys, int stride, int count, int rows, const float* q,
                                                      int depth, float* s, const PathFetch& fetch) {
  constexpr int kSlots = 8 / kVecs;
  for (int i = 0; i < count; i += kWidth) {
    fetch.part(i / kWidth, (count + kWidth - 1) / kWidth);
    alignas(64) float tile[kVecs * kWidth * kWidth];  // [vector][slot][row]
    for (int n = 0; n < kWidth; n += kSlots)
      score_lanes<Operand, kSlots, kVecs>(keys + (i + n) * stride, stride, q, depth, tile + n * kWidth);
    for (int j = 0; j < kVecs; j++) {
      Vec lines[kWidth];
      SPECDEC_UNROLL
      for (int n = 0; n < kWidth; n++) lines[n] = load(tile + (j * kWidth + n) * kWidth);
      transpose(lines);
      SPECDEC_UNROLL
      for (int n = 0; n < kWidth; n++)
        if (j * kWidth + n < rows) store(s + (j * kWidth + n) * kScoreStride + i, lines[n]);
    }
  }
}

#endif

// out [row][dim] = w [row][position] times v, added in the order of the positions to what is there.
template <class Operand, int kRows, int kVecs>
static __attribute__((noinline)) void add_dims(const typename Operand::Element* const* v, int count, int d, int dim,
                                               const float* w, float* out, int depth, const PathFetch& fetch) {
  Vec acc[kRows][kVecs];
  SPECDEC_UNROLL
  for (int r = 0; r < kRows; r++) {
    SPECDEC_UNROLL
    for (int j = 0; j < kVecs; j++) acc[r][j] = load(out + r * depth + d + j * kWidth);
  }
  for (int i = 0; i < count; i += Operand::kPositions) {
    if (i % 8 == 0) fetch.part(i / 8, (count + 7) / 8);
    Vec values[kVecs];
    Operand::template values<kVecs>(v, i, d, dim, values);
    SPECDEC_UNROLL
    for (int r = 0; r < kRows; r++) {
      const Vec weight = Operand::weight(w + r * kScoreStride, i);
      SPECDEC_UNROLL
      for (int j = 0; j < kVecs; j++) acc[r][j] = Operand::multiply(acc[r][j], weight, values[j]);
    }
  }
  SPECDEC_UNROLL
  for (int r = 0; r < kRows; r++) {
    SPECDEC_UNROLL
    for (int j = 0; j < kVecs; j++) store(out + r * depth + d + j * kWidth, acc[r][j]);
  }
}

template <class Operand, int kRows>
static SPECDEC_INLINE void add_positions(const typename Operand::Element* const* v, int count, int dim, const float* w,
                                         float* out, int depth, PathFetch fetch) {
  constexpr int kRegisters = kWidth == 16 ? 16 : 8, kMost = kRegisters / (kRows == 3 ? 4 : kRows);
  constexpr int kVecs = kMost > 8 ? 8 : kMost;  // of dims at a time
  int d = 0;
  for (; d + kVecs * kWidth <= depth; d += kVecs * kWidth, fetch.count = 0)
    add_dims<Operand, kRows, kVecs>(v, count, d, dim, w, out, depth, fetch);
  if constexpr (kVecs > 2 * Operand::kLeastVecs)
    for (; d + kVecs / 2 * kWidth <= depth; d += kVecs / 2 * kWidth, fetch.count = 0)
      add_dims<Operand, kRows, kVecs / 2>(v, count, d, dim, w, out, depth, fetch);
  for (; d < depth; d += Operand::kLeastVecs * kWidth, fetch.count = 0)
    add_dims<Operand, kRows, Operand::kLeastVecs>(v, count, d, dim, w, out, depth, fetch);
}

}  // namespace specdec::cpu::SPECDEC_ISA

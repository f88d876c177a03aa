// The engine for a handful of rows on processors with bfloat16 dot products: attention/cpu/engine_few_rows.h with pairs for numbers.
//
// Scores: a dot product along the dims, two dims to a lane, K and Q as they lie in memory. Outputs: neighbouring slots
// are the pairs. Two rows of V are interleaved in registers, which leaves the dims in an order of their own: of every
// 32 dims the first vector holds those whose bit 2 is clear and the second one the others. Outputs keep that order
// until they are read for the last time. Nothing is converted to float and nothing is packed, which halves the
// instructions per byte: with four rows a core then waits for memory, where fp32 multiply-adds would wait for the units.
#pragma once

#include "attention/cpu/engine_few_rows.h"

#if defined(__AVX512BF16__)

namespace specdec::cpu::SPECDEC_ISA {

// Outputs as [rows][dim rounded up to 32], each 32 dims in the order that interleaving leaves.
struct InterleavedOutput {
  static SPECDEC_INLINE int depth(int dim) { return round_up(dim, 32); }

  template <int kVecs>
  static SPECDEC_INLINE void scale(float* out, int depth, const Vec (&factor)[kVecs]) {
    FewRowsOutput::scale(out, depth, factor);
  }
  static void merge(float* out, const float* later, int depth, int vecs, int j, Vec a, Vec b) {
    FewRowsOutput::merge(out, later, depth, vecs, j, a, b);
  }

  static SPECDEC_INLINE size_t place(int dim, int, int row, int d) {
    return size_t(row) * depth(dim) + d / 32 * 32 + d / 4 % 2 * 16 + d % 32 / 8 * 4 + d % 4;
  }

  static SPECDEC_INLINE void read(const float* out, int dim, int, int, int d, Vec (&lines)[kWidth]) {
    // Quarters of four dims: 0, 2, 4, 6 in the first vector, 1, 3, 5, 7 in the second.
    const __m512i first_half = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i second_half = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
    const __m512i half = d % 32 == 0 ? first_half : second_half;
    for (int r = 0; r < kWidth; r++) {
      const float* at = out + r * depth(dim) + d / 32 * 32;
      lines[r] = _mm512_permutex2var_ps(load(at), half, load(at + kWidth));
    }
  }
};

// kGroupRows rows are multiplied at a time: 4, or 1 when a kv head serves one head and one row asks.
template <int kGroupRows>
struct FewRowsBf16Engine {
  using Storage = BFloat16;
  using Element = uint16_t;
  using Output = InterleavedOutput;
  static constexpr bool kQueriesByRow = true;
  static SPECDEC_INLINE size_t weights_offset(int, int) { return 0; }
  static constexpr int kPairs = 2, kWeightFloats = 1, kMaxVecs = 1, kTile = 32, kSpan = kTile,
                       kStep = kWidth / kGroupRows;

  static int query_depth(int dim) { return round_up(dim / 2, kWidth); }
  static size_t key_floats(int) { return 0; }
  static size_t value_floats(int) { return 0; }
  static SPECDEC_INLINE void enter() {}
  static SPECDEC_INLINE void leave() {}
  static SPECDEC_INLINE void pack_keys(const Tile<Element, kTile>&, int, float*) {}
  static SPECDEC_INLINE void pack_values(const Tile<Element, kTile>&, int, float*) {}

  static SPECDEC_INLINE const Element* row_of(const Group<Element>* groups, int slot) {
    const Group<Element>& group = groups[slot / kGroupSlots];
    return group.base + (slot % kGroupSlots) * group.stride;
  }

  // 32 elements of a row from dim d on; those past the end are 0 and not read.
  static SPECDEC_INLINE __m512i elements(const Element* row, int d, int dim) {
    if (d + 32 <= dim) return _mm512_loadu_si512(row + d);
    return _mm512_maskz_loadu_epi32(__mmask16((1u << ((dim - d) / 2)) - 1), row + d);
  }

  template <int kVecs>
  static void scores(const Tile<Element, kTile>& t, int, int, int dim, const float* q, const float*, float* s) {
    constexpr int kSlots = kWidth / kGroupRows;
    const int depth = query_depth(dim);
    for (int i = 0; i < t.padded; i += kSlots) {
      t.ahead.fetch_keys(i, i + kSlots, t.padded);
      const Element* keys[kSlots];
      for (int k = 0; k < kSlots; k++) keys[k] = row_of(t.k, i + k);
      for (int r = 0; r < t.rows; r += kGroupRows) {
        Vec acc[kWidth];
        SPECDEC_UNROLL
        for (int n = 0; n < kWidth; n++) acc[n] = splat(0.0f);
        for (int d = 0; d < dim; d += 32) {
          __m512bh query[kGroupRows];
          SPECDEC_UNROLL
          for (int n = 0; n < kGroupRows; n++) query[n] = (__m512bh)load(q + (r + n) * depth + d / 2);
          SPECDEC_UNROLL
          for (int k = 0; k < kSlots; k++) {
            const __m512bh key = (__m512bh)elements(keys[k], d, dim);
            SPECDEC_UNROLL
            for (int n = 0; n < kGroupRows; n++)
              acc[k * kGroupRows + n] = _mm512_dpbf16_ps(acc[k * kGroupRows + n], key, query[n]);
          }
        }
        store_scores(sums(acc), r, s + i * kWidth);
      }
    }
  }

  // `dots` is [slot][row of the group]. Every slot has a vector of its own, in which lanes without a row are 0.
  static SPECDEC_INLINE void store_scores(Vec dots, int row, float* s) {
    if constexpr (kGroupRows == 1) {
      SPECDEC_UNROLL
      for (int k = 0; k < kWidth; k++)
        store(s + k * kWidth, _mm512_maskz_permutexvar_ps(1, _mm512_set1_epi32(k), dots));
    } else {
      const __m128 parts[4] = {_mm512_extractf32x4_ps(dots, 0), _mm512_extractf32x4_ps(dots, 1),
                               _mm512_extractf32x4_ps(dots, 2), _mm512_extractf32x4_ps(dots, 3)};
      SPECDEC_UNROLL
      for (int k = 0; k < 4; k++) {
        if (row == 0)
          store(s + k * kWidth, _mm512_zextps128_ps512(parts[k]));
        else
          _mm_storeu_ps(s + k * kWidth + row, parts[k]);
      }
    }
  }

  template <int kVecs>
  static void weigh(const float* s, int slots, Vec scale, const Vec (&minus_max)[kVecs], float* p, Vec (&sum)[kVecs]) {
    weigh_pairs<kVecs>(s, slots, scale, minus_max, p, sum);
  }

  template <int kVecs>
  static void accumulate(const Tile<Element, kTile>& t, int from, int to, const float*, int dim, const float* p,
                         float* out) {
    constexpr int kBlocks = kGroupRows == 1 ? 4 : 2;  // of 32 dims at a time
    const int depth = Output::depth(dim);
    for (int r = 0; r < t.rows; r += kGroupRows) {
      int d = 0;
      for (; d + kBlocks * 32 <= dim; d += kBlocks * 32)
        add_slots<kBlocks>(t, from, to, d, dim, p + r, out + r * depth);
      for (; d < dim; d += 32) add_slots<1>(t, from, to, d, dim, p + r, out + r * depth);
    }
  }

  template <int kBlocks>
  static SPECDEC_INLINE void add_slots(const Tile<Element, kTile>& t, int from, int to, int first_dim, int dim,
                                       const float* p, float* out) {
    Vec acc[kGroupRows][2 * kBlocks];
    SPECDEC_UNROLL
    for (int n = 0; n < kGroupRows; n++) {
      SPECDEC_UNROLL
      for (int j = 0; j < 2 * kBlocks; j++) acc[n][j] = splat(0.0f);
    }
    for (int i = from; i < to; i += 2) {
      if (first_dim == 0)
        t.ahead.fetch_values(i, i + 2, t.padded);  // in their own turn: a burst fills the queue of misses
      const Element *even = row_of(t.v, i), *odd = row_of(t.v, i + 1);
      Vec weight[kGroupRows];
      SPECDEC_UNROLL
      for (int n = 0; n < kGroupRows; n++) weight[n] = splat(reinterpret_cast<const Word*>(p)[i / 2 * kWidth + n]);
      SPECDEC_UNROLL
      for (int j = 0; j < kBlocks; j++) {
        const __m512i a = elements(even, first_dim + 32 * j, dim), b = elements(odd, first_dim + 32 * j, dim);
        const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(a, b), high = (__m512bh)_mm512_unpackhi_epi16(a, b);
        SPECDEC_UNROLL
        for (int n = 0; n < kGroupRows; n++) {
          acc[n][2 * j] = _mm512_dpbf16_ps(acc[n][2 * j], (__m512bh)weight[n], low);
          acc[n][2 * j + 1] = _mm512_dpbf16_ps(acc[n][2 * j + 1], (__m512bh)weight[n], high);
        }
      }
    }
    SPECDEC_UNROLL
    for (int n = 0; n < kGroupRows; n++) {
      SPECDEC_UNROLL
      for (int j = 0; j < 2 * kBlocks; j++) {
        float* at = out + n * Output::depth(dim) + first_dim + j * kWidth;
        store(at, load(at) + acc[n][j]);
      }
    }
  }
};

}  // namespace specdec::cpu::SPECDEC_ISA

#endif

// Engines that multiply with vector instructions: fp32 multiply-adds, or bfloat16 dot products of pairs.
//
// Both products are outer products held in registers: kSlots (or kDims) broadcast scalars times kVecs row vectors. The
// block is as large as the registers allow, because what surrounds it (loads, stores of the sums, the branch at its end)
// is paid once per block: 6 by 4 or 12 by 2 vectors with 32 registers, 6 by 2 or 12 by 1 with 16. What is left over of
// the slots or dims goes through smaller blocks.
#pragma once

#include "attention/cpu/attention_kernel.h"

namespace specdec::cpu::SPECDEC_ISA {

struct MultiplyAdd {
  static SPECDEC_INLINE Vec apply(Vec accumulator, Vec a, Vec b) { return fma(a, b, accumulator); }
};
#if defined(__AVX512BF16__)
struct DotPairs {
  static SPECDEC_INLINE Vec apply(Vec accumulator, Vec a, Vec b) {
    return _mm512_dpbf16_ps(accumulator, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// acc[i][j] += sum over k of a[k * a_depth + i * a_row] * b[k * b_depth + j * kWidth]
//
// With one vector every multiplication has a row of its own, and compilers work out all of their addresses before the
// loop: more than there are registers. The others would be moved from vector registers in each step, on the port of the
// multiplications. So the loop then walks with two pointers, eight rows apart, and a row is a multiple of the stride from
// one of them.
template <class Operation, int kRows, int kVecs>
static SPECDEC_INLINE void multiply(const Word* a, int64_t a_depth, int64_t a_row, const float* b, int64_t b_depth,
                                    int depth, Vec (&acc)[kRows][kVecs]) {
  const Word* upper = a + 8 * a_row;
  for (int k = 0; k < depth; k++) {
    if constexpr (kVecs == 1) asm("" : "+r"(a), "+r"(upper));
    Vec column[kVecs];
    SPECDEC_UNROLL
    for (int j = 0; j < kVecs; j++) column[j] = load(b + k * b_depth + j * kWidth);
    SPECDEC_UNROLL
    for (int i = 0; i < kRows; i++) {
      const Vec scalar = splat(i < 8 ? a[i * a_row] : upper[(i - 8) * a_row]);
      SPECDEC_UNROLL
      for (int j = 0; j < kVecs; j++) acc[i][j] = Operation::apply(acc[i][j], scalar, column[j]);
    }
    a += a_depth;
    upper += a_depth;
  }
}

// S^T [slots][rows] for kSlots slots.
template <class Operation, int kSlots, int kVecs>
static __attribute__((noinline)) void score_slots(const Word* k, int64_t stride, const float* q, int depth, float* s) {
  Vec acc[kSlots][kVecs];
  SPECDEC_UNROLL
  for (int i = 0; i < kSlots; i++) {
    SPECDEC_UNROLL
    for (int j = 0; j < kVecs; j++) acc[i][j] = splat(0.0f);
  }
  multiply<Operation, kSlots, kVecs>(k, 1, stride, q, kVecs * kWidth, depth, acc);
  SPECDEC_UNROLL
  for (int i = 0; i < kSlots; i++) {
    SPECDEC_UNROLL
    for (int j = 0; j < kVecs; j++) store(s + (i * kVecs + j) * kWidth, acc[i][j]);
  }
}

// O^T [dims][rows] += V^T P^T for kDims dims; v is [depth][dim], p is [depth][rows]. A tile is summed on its own before
// it is added, which keeps the rounding error of long contexts down.
template <class Operation, int kDims, int kVecs>
static __attribute__((noinline)) void add_dims(const float* v, int dim, const float* p, int depth, float* out) {
  Vec acc[kDims][kVecs];
  SPECDEC_UNROLL
  for (int i = 0; i < kDims; i++) {
    SPECDEC_UNROLL
    for (int j = 0; j < kVecs; j++) acc[i][j] = splat(0.0f);
  }
  multiply<Operation, kDims, kVecs>(reinterpret_cast<const Word*>(v), dim, 1, p, kVecs * kWidth, depth, acc);
  SPECDEC_UNROLL
  for (int i = 0; i < kDims; i++) {
    SPECDEC_UNROLL
    for (int j = 0; j < kVecs; j++) {
      float* at = out + (i * kVecs + j) * kWidth;
      store(at, load(at) + acc[i][j]);
    }
  }
}

// Slots and dims come in sixteens. What blocks of kRows leave of them goes through blocks of so many, 0 if nothing is left.
static constexpr int remainder_rows(int rows) { return 16 % rows == 0 ? 0 : (rows % 4 == 0 ? 4 : 2); }

template <class Operation, int kDims, int kVecs>
static SPECDEC_INLINE void accumulate_rows(const float* v, int depth, int dim, const float* p, float* out) {
  constexpr int kRemainder = remainder_rows(kDims);
  int d = 0;
  for (; d + kDims <= dim; d += kDims)
    add_dims<Operation, kDims, kVecs>(v + d, dim, p, depth, out + d * kVecs * kWidth);
  if constexpr (kRemainder != 0)
    for (; d < dim; d += kRemainder)
      add_dims<Operation, kRemainder, kVecs>(v + d, dim, p, depth, out + d * kVecs * kWidth);
}

// fp32 arithmetic. Tiles of K and V are converted (or copied) to packed fp32 rows, which costs 1 / rows of the
// multiplication. fp32 keys are copied too: a copy keeps many more misses in flight than products that wait for their
// keys one by one (1.1 to 1.5 times faster on a cold cache), and rows of a token-major cache, which lie a power of two
// apart, would fall into the same few sets of the first cache. Rows that are neighbours are multiplied where they lie if
// software has fetched them ahead.
template <class StorageType, int kMaxVecsValue, int kTileValue>
struct FmaEngine {
  using Storage = StorageType;
  using Element = typename Storage::Element;
  using SlotTile = Tile<Element, kTileValue>;
  static constexpr int kPairs = 1, kWeightFloats = 1, kMaxVecs = kMaxVecsValue, kTile = kTileValue;
  template <int kVecs>
  static constexpr int kRegisterRows = kWidth == 16 ? (kVecs == 1 ? 16 : 24 / kVecs) : (kMaxVecs == 2 ? 12 / kVecs : 4);
  static constexpr int kStep = 16;

  static int query_depth(int dim) { return dim; }
  static size_t key_floats(int dim) { return size_t(kTile) * dim; }
  static size_t value_floats(int dim) { return size_t(kTile) * dim; }
  using Output = ColumnOutput;
  static constexpr int kSpan = kMaxVecs == 4 ? kTile / 2 : kTile;  // scores beside packed queries in the first cache
  static constexpr bool kQueriesByRow = false;
  static SPECDEC_INLINE size_t weights_offset(int slot, int vecs) { return size_t(slot) * vecs * kWidth; }
  static SPECDEC_INLINE void enter() {}
  static SPECDEC_INLINE void leave() {}

  // Where the tile's rows lie one after the other as floats, or null.
  static const float* in_place(const SlotTile& t, const Group<Element>* groups, int dim) {
    if constexpr (std::is_same_v<Storage, Float32>) {
      bool dense = t.fetched_ahead;
      for (int g = 0; g * kGroupSlots < t.padded; g++)
        dense = dense && groups[g].stride == dim && groups[g].base == groups[0].base + int64_t(g) * kGroupSlots * dim;
      if (dense) return groups[0].base;
    }
    return nullptr;
  }

  static void widen(const SlotTile& t, const Group<Element>* groups, int dim, float* to) {
    if (in_place(t, groups, dim)) return;
    for (int i = 0; i < t.padded; i++) {
      const Element* row = groups[i / kGroupSlots].base + (i % kGroupSlots) * groups[i / kGroupSlots].stride;
      for (int d = 0; d < dim; d += kWidth) store(to + size_t(i) * dim + d, Storage::load_vec(row + d));
    }
  }
  static void pack_keys(const SlotTile& t, int dim, float* packed) { widen(t, t.k, dim, packed); }
  static void pack_values(const SlotTile& t, int dim, float* packed) { widen(t, t.v, dim, packed); }

  template <int kVecs>
  static void scores(const SlotTile& t, int from, int to, int dim, const float* q, const float* packed, float* s) {
    constexpr int kSlots = kRegisterRows<kVecs>, kRemainder = remainder_rows(kSlots);
    const float* placed = in_place(t, t.k, dim);
    const Word* k = reinterpret_cast<const Word*>(placed ? placed : packed);
    int i = from;
    for (; i + kSlots <= to; i += kSlots) {
      score_slots<MultiplyAdd, kSlots, kVecs>(k + size_t(i) * dim, dim, q, dim, s + (i - from) * kVecs * kWidth);
      t.ahead.fetch(i, i + kSlots, t.padded);
    }
    if constexpr (kRemainder != 0)
      for (; i < to; i += kRemainder) {
        score_slots<MultiplyAdd, kRemainder, kVecs>(k + size_t(i) * dim, dim, q, dim, s + (i - from) * kVecs * kWidth);
        t.ahead.fetch(i, i + kRemainder, t.padded);
      }
  }

  template <int kVecs>
  static void accumulate(const SlotTile& t, int from, int to, const float* packed, int dim, const float* p,
                         float* out) {
    const float* placed = in_place(t, t.v, dim);
    accumulate_rows<MultiplyAdd, kRegisterRows<kVecs>, kVecs>((placed ? placed : packed) + size_t(from) * dim,
                                                              to - from, dim, p + weights_offset(from, kVecs), out);
  }

  template <int kVecs>
  static void weigh(const float* s, int slots, Vec scale, const Vec (&minus_max)[kVecs], float* p, Vec (&sum)[kVecs]) {
    for (int i = 0; i < slots; i++) SPECDEC_UNROLL
    for (int j = 0; j < kVecs; j++) {
      const Vec exponent = rounded_product(load(s + (i * kVecs + j) * kWidth), scale) + minus_max[j];
      const Vec weight = std::is_same_v<Storage, BFloat16> ? exp2_bf16(exponent) : exp2(exponent);
      sum[j] = sum[j] + weight;
      store(p + (i * kVecs + j) * kWidth, weight);
    }
  }
};

#if defined(__AVX512BF16__)

// Weights of neighbouring slots as pairs of bfloat16, ready to be multiplied with pairs of V.
template <int kVecs>
static SPECDEC_INLINE void weigh_pairs(const float* s, int slots, Vec scale, const Vec (&minus_max)[kVecs], float* p,
                                       Vec (&sum)[kVecs]) {
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int i = 0; i < slots; i += 2) SPECDEC_UNROLL
  for (int j = 0; j < kVecs; j++) {
    const float* at = s + (i * kVecs + j) * kWidth;
    const Vec first = exp2_bf16(rounded_product(load(at), scale) + minus_max[j]);
    const Vec second = exp2_bf16(rounded_product(load(at + kVecs * kWidth), scale) + minus_max[j]);
    sum[j] = sum[j] + (first + second);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    _mm512_storeu_si512(p + (i / 2 * kVecs + j) * kWidth, _mm512_permutexvar_epi16(interleave, both));
  }
}

// bfloat16 products of pairs, fp32 sums. K is broadcast in place, two dims at a time; V is packed as pairs of slots.
struct DotEngine {
  using Storage = BFloat16;
  using Element = uint16_t;
  static constexpr int kPairs = 2, kWeightFloats = 1, kMaxVecs = 4, kTile = 64, kSpan = 64, kStep = 16;
  template <int kVecs>
  static constexpr int kRegisterRows = kVecs == 1 ? 16 : 24 / kVecs;

  static int query_depth(int dim) { return dim / 2; }
  static size_t key_floats(int) { return 0; }
  static size_t value_floats(int dim) { return size_t(kTile) / 2 * dim; }
  using Output = ColumnOutput;
  static constexpr bool kQueriesByRow = false;
  static SPECDEC_INLINE size_t weights_offset(int slot, int vecs) { return size_t(slot) / 2 * vecs * kWidth; }
  static SPECDEC_INLINE void enter() {}
  static SPECDEC_INLINE void leave() {}
  static SPECDEC_INLINE void pack_keys(const Tile<Element, kTile>&, int, float*) {}

  static void pack_values(const Tile<Element, kTile>& t, int dim, float* packed) {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int i = 0; i < t.padded; i += 2) {
      const Group<Element>& group = t.v[i / kGroupSlots];
      const Element* first = group.base + (i % kGroupSlots) * group.stride;
      float* to = packed + size_t(i) / 2 * dim;
      for (int d = 0; d < dim; d += 16) {
        const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + d));
        const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + group.stride + d));
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
        _mm512_storeu_si512(to + d, _mm512_permutexvar_epi16(interleave, both));
      }
    }
  }

  // Keys lie at one stride within a group only.
  template <int kVecs>
  static void scores(const Tile<Element, kTile>& t, int from, int to, int dim, const float* q, const float*, float* s) {
    constexpr int kSlots = kRegisterRows<kVecs>, kRemainder = kGroupSlots % kSlots;
    for (int first = from; first < to; first += kGroupSlots) {
      const Group<Element>& group = t.k[first / kGroupSlots];
      const Word* k = reinterpret_cast<const Word*>(group.base);
      const int64_t stride = group.stride / 2;
      float* at = s + (first - from) * kVecs * kWidth;
      int i = 0;
      for (; i + kSlots <= kGroupSlots; i += kSlots)
        score_slots<DotPairs, kSlots, kVecs>(k + i * stride, stride, q, dim / 2, at + i * kVecs * kWidth);
      if constexpr (kRemainder != 0)
        for (; i < kGroupSlots; i += kRemainder)
          score_slots<DotPairs, kRemainder, kVecs>(k + i * stride, stride, q, dim / 2, at + i * kVecs * kWidth);
      t.ahead.fetch(first, first + kGroupSlots, t.padded);
    }
  }

  template <int kVecs>
  static void accumulate(const Tile<Element, kTile>&, int from, int to, const float* v, int dim, const float* p,
                         float* out) {
    accumulate_rows<DotPairs, kRegisterRows<kVecs>, kVecs>(v + size_t(from) / 2 * dim, (to - from) / 2, dim,
                                                           p + weights_offset(from, kVecs), out);
  }

  template <int kVecs>
  static void weigh(const float* s, int slots, Vec scale, const Vec (&minus_max)[kVecs], float* p, Vec (&sum)[kVecs]) {
    weigh_pairs<kVecs>(s, slots, scale, minus_max, p, sum);
  }
};

#endif

}  // namespace specdec::cpu::SPECDEC_ISA

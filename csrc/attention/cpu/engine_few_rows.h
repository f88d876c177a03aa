// The engine for a handful of rows (plain decoding, small groups): dims are the vector dimension.
//
// With the rows as lanes, as in attention/cpu/attention_kernel.h, four rows would leave most lanes idle. Here a score is a dot product along
// the dims: kWidth accumulators for four rows and a few slots, reduced together so that the reduction's shuffles are
// shared. Outputs are kept by rows, [row][dim], and take V as it lies. Nothing is packed: each byte of K and V is
// touched once, which is all that matters when the kernel waits for memory. Weights still lie [slot][row].
#pragma once

#include "attention/cpu/engine_fma.h"

namespace specdec::cpu::SPECDEC_ISA {

// Outputs as [rows][dim].
struct FewRowsOutput {
  static SPECDEC_INLINE int depth(int dim) { return dim; }

  template <int kVecs>
  static SPECDEC_INLINE void scale(float* out, int dim, const Vec (&factor)[kVecs]) {
    alignas(64) float by_row[kWidth];
    store(by_row, factor[0]);
    for (int r = 0; r < kWidth; r++) {
      for (int d = 0; d < dim; d += kWidth) store(out + r * dim + d, load(out + r * dim + d) * splat(by_row[r]));
    }
  }

  static void merge(float* out, const float* later, int dim, int, int, Vec a, Vec b) {
    alignas(64) float of_out[kWidth], of_later[kWidth];
    store(of_out, a);
    store(of_later, b);
    for (int r = 0; r < kWidth; r++) {
      for (int d = r * dim; d < (r + 1) * dim; d += kWidth) {
        store(out + d, fma(load(out + d), splat(of_out[r]), load(later + d) * splat(of_later[r])));
      }
    }
  }

  static SPECDEC_INLINE size_t place(int dim, int, int row, int d) { return size_t(row) * dim + d; }

  static SPECDEC_INLINE void read(const float* out, int dim, int, int, int d, Vec (&lines)[kWidth]) {
    for (int r = 0; r < kWidth; r++) lines[r] = load(out + r * dim + d);
  }
};

// kGroupRows rows are multiplied at a time: 4, or 1 when a kv head serves one head and one row asks.
template <class StorageType, int kGroupRows>
struct FewRowsEngine {
  using Storage = StorageType;
  using Element = typename Storage::Element;
  using Output = FewRowsOutput;
  static constexpr bool kQueriesByRow = true;
  static SPECDEC_INLINE size_t weights_offset(int, int) { return 0; }
  static constexpr int kPairs = 1, kWeightFloats = 1, kMaxVecs = 1, kTile = 32, kSpan = kTile,
                       kStep = max_of(4, kWidth / kGroupRows);

  static int query_depth(int dim) { return dim; }
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

  template <int kVecs>
  static void scores(const Tile<Element, kTile>& t, int, int, int dim, const float* q, const float*, float* s) {
    constexpr int kSlots = kWidth / kGroupRows;
    for (int i = 0; i < t.padded; i += kSlots) {
      t.ahead.fetch_keys(i, i + kSlots, t.padded);
      for (int i2 = 0; i2 < kSlots; i2++) store(s + (i + i2) * kWidth, splat(0.0f));
      const Element* keys[kSlots];
      for (int k = 0; k < kSlots; k++) keys[k] = row_of(t.k, i + k);
      for (int r = 0; r < t.rows; r += kGroupRows) {
        Vec acc[kWidth];
        SPECDEC_UNROLL
        for (int n = 0; n < kWidth; n++) acc[n] = splat(0.0f);
        for (int d = 0; d < dim; d += kWidth) {
          Vec query[kGroupRows];
          SPECDEC_UNROLL
          for (int n = 0; n < kGroupRows; n++) query[n] = load(q + (r + n) * dim + d);
          SPECDEC_UNROLL
          for (int k = 0; k < kSlots; k++) {
            const Vec key = Storage::load_vec(keys[k] + d);
            SPECDEC_UNROLL
            for (int n = 0; n < kGroupRows; n++) acc[k * kGroupRows + n] = fma(key, query[n], acc[k * kGroupRows + n]);
          }
        }
        alignas(64) float dots[kWidth];
        store(dots, sums(acc));
        SPECDEC_UNROLL
        for (int k = 0; k < kSlots; k++) {
          SPECDEC_UNROLL
          for (int n = 0; n < kGroupRows; n++) s[(i + k) * kWidth + r + n] = dots[k * kGroupRows + n];
        }
      }
    }
  }

  template <int kVecs>
  static void weigh(const float* s, int slots, Vec scale, const Vec (&minus_max)[kVecs], float* p, Vec (&sum)[kVecs]) {
    for (int i = 0; i < slots; i++) {
      const Vec weight = exp2(rounded_product(load(s + i * kWidth), scale) + minus_max[0]);
      sum[0] = sum[0] + weight;
      store(p + i * kWidth, weight);
    }
  }

  template <int kVecs>
  static void accumulate(const Tile<Element, kTile>& t, int, int, const float*, int dim, const float* p, float* out) {
    constexpr int kDims = kGroupRows == 1 || kWidth == 8 ? 2 : 4;  // vectors of dims at a time
    for (int r = 0; r < t.rows; r += kGroupRows) {
      int d = 0;
      for (; d + kDims * kWidth <= dim; d += kDims * kWidth) add_slots<kDims>(t, d, p + r, dim, out + r * dim + d);
      for (; d < dim; d += kWidth) add_slots<1>(t, d, p + r, dim, out + r * dim + d);
    }
  }

  template <int kDims>
  static SPECDEC_INLINE void add_slots(const Tile<Element, kTile>& t, int d, const float* p, int dim, float* out) {
    Vec acc[kGroupRows][kDims];
    SPECDEC_UNROLL
    for (int n = 0; n < kGroupRows; n++) {
      SPECDEC_UNROLL
      for (int j = 0; j < kDims; j++) acc[n][j] = splat(0.0f);
    }
    for (int i = 0; i < t.count; i++) {
      if (d == 0) t.ahead.fetch_values(i, i + 1, t.padded);  // in their own turn: a burst fills the queue of misses
      const Element* value = row_of(t.v, i) + d;
      Vec v[kDims];
      SPECDEC_UNROLL
      for (int j = 0; j < kDims; j++) v[j] = Storage::load_vec(value + j * kWidth);
      SPECDEC_UNROLL
      for (int n = 0; n < kGroupRows; n++) {
        const Vec weight = splat(p[i * kWidth + n]);
        SPECDEC_UNROLL
        for (int j = 0; j < kDims; j++) acc[n][j] = fma(weight, v[j], acc[n][j]);
      }
    }
    SPECDEC_UNROLL
    for (int n = 0; n < kGroupRows; n++) {
      SPECDEC_UNROLL
      for (int j = 0; j < kDims; j++) {
        float* at = out + n * dim + j * kWidth;
        store(at, load(at) + acc[n][j]);
      }
    }
  }
};

template <class Storage, int kMaxVecs, int kTile>
static const TaskKernel* select_for_storage(int rows) {
  if (rows == 1) return &kAttentionKernel<FewRowsEngine<Storage, 1>>;
  if (rows <= kMaxFewRows) return &kAttentionKernel<FewRowsEngine<Storage, 4>>;
  return &kAttentionKernel<FmaEngine<Storage, kMaxVecs, kTile>>;
}

// The kernels that compute in fp32, for every dtype.
template <int kMaxVecs, int kTile>
static const TaskKernel* select_float_kernel(DType dtype, int rows) {
  switch (dtype) {
    case DType::kFloat32:
      return select_for_storage<Float32, kMaxVecs, kTile>(rows);
    case DType::kBFloat16:
      return select_for_storage<BFloat16, kMaxVecs, kTile>(rows);
    case DType::kFloat16:
      return select_for_storage<Float16, kMaxVecs, kTile>(rows);
  }
  return nullptr;
}

}  // namespace specdec::cpu::SPECDEC_ISA

// What the engines of attention/cpu/attention_kernel.h work on: tiles of slots, and outputs by column.
#pragma once

#include "attention/cpu/task.h"
#include "common/cpu/simd.h"

namespace specdec::cpu::SPECDEC_ISA {

// 32 bits of memory: one float, or a pair of bfloat16, which may lie at any even address.
using Word = float __attribute__((may_alias, aligned(2)));

// Rows of K or V: sixteen slots at a constant stride, in the cache or in a zero-padded copy.
template <class Element>
struct Group {
  const Element* base;
  int64_t stride;  // elements
};

// The rows of the next tile, fetched ahead while the first row block of this one is multiplied.
struct Ahead {
  const char *k = nullptr, *v = nullptr;
  int64_t k_stride = 0, v_stride = 0;  // bytes
  int slots = 0, bytes = 0;

  // The share of those rows that belongs to slots [from, to) of the `padded` ones at hand.
  SPECDEC_INLINE void fetch(int from, int to, int padded) const {
    fetch_keys(from, to, padded);
    fetch_values(from, to, padded);
  }
  SPECDEC_INLINE void fetch_keys(int from, int to, int padded) const { fetch_rows(k, k_stride, from, to, padded); }
  SPECDEC_INLINE void fetch_values(int from, int to, int padded) const { fetch_rows(v, v_stride, from, to, padded); }

 private:
  SPECDEC_INLINE void fetch_rows(const char* rows, int64_t stride, int from, int to, int padded) const {
    for (int i = slots * from / padded; i < slots * to / padded; i++)
      for (int b = 0; b < bytes; b += 64) __builtin_prefetch(rows + i * stride + b, 0, 2);
  }
};

template <class Element, int kTile>
struct Tile {
  int begin, count, padded;  // first slot, slots, slots with padding
  bool masked;
  bool fetched_ahead;  // in software, by whoever was at the tile before
  int rows;            // of the task
  Group<Element> k[kTile / kGroupSlots], v[kTile / kGroupSlots];
  Ahead ahead;
};

// Outputs kept as O^T [dim][rows of the block].
struct ColumnOutput {
  static SPECDEC_INLINE int depth(int dim) { return dim; }

  template <int kVecs>
  static SPECDEC_INLINE void scale(float* out, int dim, const Vec (&factor)[kVecs]) {
    for (int d = 0; d < dim; d++) SPECDEC_UNROLL
    for (int j = 0; j < kVecs; j++) {
      float* at = out + (size_t(d) * kVecs + j) * kWidth;
      store(at, load(at) * factor[j]);
    }
  }

  // out = out * a + later * b for the rows of vector j.
  static void merge(float* out, const float* later, int dim, int vecs, int j, Vec a, Vec b) {
    for (int d = 0; d < dim; d++) {
      const size_t at = (size_t(d) * vecs + j) * kWidth;
      store(out + at, fma(load(out + at), a, load(later + at) * b));
    }
  }

  // Where one number lies.
  static SPECDEC_INLINE size_t place(int, int vecs, int row, int d) { return size_t(d) * vecs * kWidth + row; }

  // Dims d .. d + kWidth of kWidth rows from row `first` of the block on.
  static SPECDEC_INLINE void read(const float* out, int, int width, int first, int d, Vec (&lines)[kWidth]) {
    SPECDEC_UNROLL
    for (int i = 0; i < kWidth; i++) lines[i] = load(out + size_t(d + i) * width + first);
    transpose(lines);
  }
};

}  // namespace specdec::cpu::SPECDEC_ISA

// The matrix engine for few rows, where packing V would cost more than multiplying with it.
//
// Outputs are kept by rows: C [16 rows][16 dims] += A [16 rows][slots] B [slots][dims]. A matrix product multiplies
// pairs: C[m][n] += A[m][2k] B[k][2n] + A[m][2k+1] B[k][2n+1]. With B a tile of V exactly as it lies in the cache (16
// slots by 32 dims) the pairs are neighbouring dims, so A holds each weight beside a zero: (weight, 0) yields the even
// dims, (0, weight) the odd ones. Half of the products are wasted, which is cheaper than touching V twice: neither K
// nor V is ever copied, and the kernel runs at the speed of memory. A block is 16 rows; V comes from the caches once
// per block.
//
// Scores are formed as in attention/cpu/engine_amx.h, S^T [slot][row]; the weights are transposed on the way to A.
#pragma once

#include "attention/cpu/engine_amx.h"

#if defined(__AMX_BF16__)

namespace specdec::cpu::SPECDEC_ISA {

// Outputs of 16 rows as matrix tiles [dim / 32][even, odd][16 rows][16 dims]; dims past `dim` are never read.
struct RowOutput {
  static constexpr int kTileFloats = 256;

  static SPECDEC_INLINE int depth(int dim) { return round_up(dim, 32); }

  template <int kVecs>
  static SPECDEC_INLINE void scale(float* out, int dim, const Vec (&factor)[kVecs]) {
    alignas(64) float by_row[kWidth];
    store(by_row, factor[0]);
    for (int tile = 0; tile < dim / 16; tile++)
      for (int r = 0; r < 16; r++) {
        float* at = out + tile * kTileFloats + r * 16;
        store(at, load(at) * splat(by_row[r]));
      }
  }

  static void merge(float* out, const float* later, int dim, int, int, Vec a, Vec b) {
    alignas(64) float of_out[kWidth], of_later[kWidth];
    store(of_out, a);
    store(of_later, b);
    for (int tile = 0; tile < dim / 16; tile++)
      for (int r = 0; r < 16; r++) {
        const int at = tile * kTileFloats + r * 16;
        store(out + at, fma(load(out + at), splat(of_out[r]), load(later + at) * splat(of_later[r])));
      }
  }

  static SPECDEC_INLINE size_t place(int, int, int row, int d) {
    return (size_t(d) / 32 * 2 + d % 2) * kTileFloats + row * 16 + d % 32 / 2;
  }

  static SPECDEC_INLINE void read(const float* out, int, int, int, int d, Vec (&lines)[kWidth]) {
    const float* even = out + d / 32 * 2 * kTileFloats + d % 32 / 2;
    const __m512i order = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int r = 0; r < kWidth; r++) {
      const Vec a = _mm512_castps256_ps512(_mm256_loadu_ps(even + r * 16));
      const Vec b = _mm512_castps256_ps512(_mm256_loadu_ps(even + kTileFloats + r * 16));
      lines[r] = _mm512_permutex2var_ps(a, order, b);
    }
  }
};

struct AmxRowsEngine {
  using Storage = BFloat16;
  using Element = uint16_t;
  using Output = RowOutput;
  static constexpr bool kQueriesByRow = false;
  static SPECDEC_INLINE size_t weights_offset(int, int) { return 0; }
  static constexpr int kPairs = 2, kWeightFloats = 2, kMaxVecs = 1, kTile = 64, kSpan = kTile, kStep = 32;
  using Scores = AmxEngine<kTile>;

  static int query_depth(int dim) { return Scores::query_depth(dim); }
  static size_t key_floats(int dim) { return Scores::key_floats(dim); }
  static size_t value_floats(int dim) { return Scores::key_floats(dim); }
  static SPECDEC_INLINE void enter() { Scores::enter(); }
  static SPECDEC_INLINE void leave() { Scores::leave(); }

  static void pack_keys(const Tile<Element, kTile>& t, int dim, float* packed) { Scores::pack_keys(t, dim, packed); }

  static void pack_values(const Tile<Element, kTile>& t, int dim, float* packed) {
    pack_tails(t.v, t.padded, dim, packed);
  }

  template <int kVecs>
  static void scores(const Tile<Element, kTile>& t, int from, int to, int dim, const float* q, const float* tail,
                     float* s) {
    Scores::scores<kVecs>(t, from, to, dim, q, tail, s);
  }

  // For each 16 slots two tiles [16 rows][16 slots]: (weight, 0) and (0, weight), rounded to bfloat16.
  template <int kVecs>
  static void weigh(const float* s, int slots, Vec scale, const Vec (&minus_max)[kVecs], float* p, Vec (&sum)[kVecs]) {
    const __m512i half = _mm512_set1_epi32(0x8000), high = _mm512_set1_epi32(int(0xffff0000));
    for (int i = 0; i < slots; i += 16) {
      Vec w[16];
      SPECDEC_UNROLL
      for (int k = 0; k < 16; k++) {
        w[k] = exp2_bf16(rounded_product(load(s + (i + k) * kWidth), scale) + minus_max[0]);
        sum[0] = sum[0] + w[k];
      }
      transpose(w);
      float* to = p + i * 2 * kWidth;
      SPECDEC_UNROLL
      for (int r = 0; r < 16; r++) {
        const __m512i odd = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(w[r]), half), high);
        _mm512_storeu_si512(to + r * 16, _mm512_srli_epi32(odd, 16));
        _mm512_storeu_si512(to + 256 + r * 16, odd);
      }
    }
  }

  template <int kVecs>
  static void accumulate(const Tile<Element, kTile>& t, int, int, const float* tail, int dim, const float* p,
                         float* out) {
    complete_stores();
    int d = 0;
    for (; d + 64 <= dim; d += 64) accumulate_dims<2>(t, tail, dim, d, p, out);
    for (; d < dim; d += 32) accumulate_dims<1>(t, tail, dim, d, p, out);
  }

  // Thirty-two dims per column: tiles 0 and 1 are the even and odd dims of the first, 2 and 3 of the second.
  template <int kColumns>
  static SPECDEC_INLINE void accumulate_dims(const Tile<Element, kTile>& t, const float* tail, int dim, int d,
                                             const float* p, float* out) {
    float* to = out + d / 32 * 512;
    _tile_loadd(0, to, 64);
    _tile_loadd(1, to + 256, 64);
    if (kColumns == 2) {
      _tile_loadd(2, to + 512, 64);
      _tile_loadd(3, to + 768, 64);
    }
    const bool in_place = d + 32 * kColumns <= dim;
    for (int i = 0; i < t.padded; i += 16) {
      const Group<Element>& v = t.v[i / kGroupSlots];
      _tile_loadd(4, p + i * 2 * kWidth, 64);
      _tile_loadd(5, p + i * 2 * kWidth + 256, 64);
      if (in_place)
        _tile_loadd(6, v.base + d, v.stride * 2);
      else
        _tile_loadd(6, tail + size_t(i) * 16, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      if (kColumns == 2) {
        _tile_loadd(7, v.base + d + 32, v.stride * 2);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, to, 64);
    _tile_stored(1, to + 256, 64);
    if (kColumns == 2) {
      _tile_stored(2, to + 512, 64);
      _tile_stored(3, to + 768, 64);
    }
  }
};

}  // namespace specdec::cpu::SPECDEC_ISA

#endif

// The engine that multiplies with AMX matrix tiles: sixteen slots by sixteen rows, thirty-two bfloat16 deep.
//
// A tile register holds 16 rows of 64 bytes. Scores: C [16 slots][16 rows] += A [16 slots][32 dims] B [16 dim pairs]
// [16 rows]. A is K as it lies in the cache, loaded at the cache's stride; B is the packed Q. Outputs: C [16 dims]
// [16 rows] += A [16 dims][32 slots] B [16 slot pairs][16 rows]. B is the weights as the softmax leaves them; A is V
// transposed, which is the one repacking per tile of slots (12 cycles a slot at dim 128, shared by all row blocks).
// Two by two tiles are multiplied per step, so each tile that is loaded is used twice.
#pragma once

#include "cpu/multiply.h"

#if defined(__AMX_BF16__)

namespace specdec::SPECDEC_ISA {

// The compiler does not know that the tile instructions read memory (GCC's intrinsics don't say so): stores before them
// could be delayed past them, or dropped. This orders them.
static SPECDEC_INLINE void complete_stores() { __asm__ volatile("" ::: "memory"); }

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Dims past the last multiple of 32, padded with zeros to 32, so that a matrix tile never reads past a row.
static void pack_tails(const Group<uint16_t>* groups, int padded, int dim, float* packed) {
  if (dim % 32 == 0) return;
  for (int i = 0; i < padded; i++) {
    const Group<uint16_t>& group = groups[i / kGroupSlots];
    const uint16_t* tail = group.base + (i % kGroupSlots) * group.stride + dim / 32 * 32;
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tail));
    _mm512_storeu_si512(packed + size_t(i) * 16, _mm512_zextsi256_si512(bits));
  }
}

template <int kTileValue>
struct MatrixEngine {
  using Storage = BFloat16;
  using Element = uint16_t;
  using Output = ColumnOutput;
  static constexpr bool kQueriesByRow = false;
  static constexpr int kPairs = 2, kWeightFloats = 1, kMaxVecs = 2, kTile = kTileValue, kStep = 32;

  static int query_depth(int dim) { return round_up(dim, 32) / 2; }
  static size_t key_floats(int dim) { return dim % 32 ? size_t(kTile) * 16 : 0; }
  static size_t value_floats(int dim) { return size_t(kTile) / 2 * dim; }

  static SPECDEC_INLINE void enter() {
    const TileConfig config;
    complete_stores();
    _tile_loadconfig(&config);
  }
  static SPECDEC_INLINE void leave() { _tile_release(); }

  static void pack_keys(const Tile<Element, kTile>& t, int dim, float* packed) {
    pack_tails(t.k, t.padded, dim, packed);
  }

  // V^T as matrix tiles [dim / 16][slots / 32][16 dims][32 slots]. Eight registers hold eight dims of thirty-two slots:
  // register i has slots i, 8 + i, 16 + i, 24 + i in its four 128-bit lanes, so that an 8x8 transpose within the lanes
  // (three rounds of unpacking) leaves each register with one dim of slots 0..31 in order.
  static void pack_values(const Tile<Element, kTile>& t, int dim, float* packed) {
    const int depth_tiles = t.padded / 32;
    alignas(64) Element rows[32 * 256];  // V's rows side by side: in the cache they are often a
                                         // power of two apart and would evict each other between the passes below
    for (int n = 0; n < depth_tiles; n++) {
      for (int i = 0; i < 32; i++) {
        const Group<Element>& group = t.v[2 * n + i / kGroupSlots];
        copy_row(group.base + (i % kGroupSlots) * group.stride, dim, rows + i * dim);
      }
      for (int d = 0; d < dim; d += 8) {
        char* to = reinterpret_cast<char*>(packed) + (size_t(d / 16) * depth_tiles + n) * 1024 + d % 16 * 64;
        transpose_8x32(rows + d, dim, to);
      }
    }
  }

  static SPECDEC_INLINE void copy_row(const Element* from, int dim, Element* to) {
    int d = 0;
    for (; d + 32 <= dim; d += 32) _mm512_storeu_si512(to + d, _mm512_loadu_si512(from + d));
    if (d < dim)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + d),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + d)));
  }

  static SPECDEC_INLINE void transpose_8x32(const Element* rows, int64_t stride, char* to) {
    __m512i a[8], b[8];
    SPECDEC_UNROLL
    for (int i = 0; i < 8; i++) {
      const auto lane = [&](int k) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + (i + 8 * k) * stride));
      };
      __m512i lanes = _mm512_castsi128_si512(lane(0));
      lanes = _mm512_mask_broadcast_i32x4(lanes, 0x00f0, lane(1));
      lanes = _mm512_mask_broadcast_i32x4(lanes, 0x0f00, lane(2));
      a[i] = _mm512_mask_broadcast_i32x4(lanes, 0xf000, lane(3));
    }
    SPECDEC_UNROLL
    for (int i = 0; i < 4; i++) {
      b[2 * i] = _mm512_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
      b[2 * i + 1] = _mm512_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
    }
    SPECDEC_UNROLL
    for (int i = 0; i < 2; i++) {
      a[4 * i] = _mm512_unpacklo_epi32(b[4 * i], b[4 * i + 2]);
      a[4 * i + 1] = _mm512_unpackhi_epi32(b[4 * i], b[4 * i + 2]);
      a[4 * i + 2] = _mm512_unpacklo_epi32(b[4 * i + 1], b[4 * i + 3]);
      a[4 * i + 3] = _mm512_unpackhi_epi32(b[4 * i + 1], b[4 * i + 3]);
    }
    SPECDEC_UNROLL
    for (int i = 0; i < 4; i++) {
      _mm512_storeu_si512(to + (2 * i) * 64, _mm512_unpacklo_epi64(a[i], a[i + 4]));
      _mm512_storeu_si512(to + (2 * i + 1) * 64, _mm512_unpackhi_epi64(a[i], a[i + 4]));
    }
  }

  template <int kVecs>
  static void scores(const Tile<Element, kTile>& t, int dim, const float* q, const float* tail, float* s) {
    complete_stores();
    constexpr int kRowBytes = kVecs * kWidth * 4;
    const int steps = round_up(dim, 32) / 32, whole = dim / 32;
    for (int i = 0; i < t.padded; i += 32) {
      const Group<Element>&low = t.k[i / kGroupSlots], &high = t.k[i / kGroupSlots + 1];
      _tile_zero(0);
      _tile_zero(1);
      if (kVecs == 2) {
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int step = 0; step < steps; step++) {
        const float* columns = q + size_t(step) * 16 * kVecs * kWidth;
        if (step < whole) {
          _tile_loadd(4, low.base + step * 32, low.stride * 2);
          _tile_loadd(5, high.base + step * 32, high.stride * 2);
        } else {
          _tile_loadd(4, tail + size_t(i) * 16, 64);
          _tile_loadd(5, tail + size_t(i + 16) * 16, 64);
        }
        _tile_loadd(6, columns, kRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (kVecs == 2) {
          _tile_loadd(7, columns + kWidth, kRowBytes);
          _tile_dpbf16ps(2, 4, 7);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      float* to = s + i * kVecs * kWidth;
      _tile_stored(0, to, kRowBytes);
      _tile_stored(1, to + 16 * kVecs * kWidth, kRowBytes);
      if (kVecs == 2) {
        _tile_stored(2, to + kWidth, kRowBytes);
        _tile_stored(3, to + 16 * kVecs * kWidth + kWidth, kRowBytes);
      }
    }
  }

  template <int kVecs>
  static void accumulate(const Tile<Element, kTile>& t, const float* v, int dim, const float* p, float* out) {
    complete_stores();
    int d = 0;
    for (; d + 32 <= dim; d += 32) accumulate_dims<kVecs, 2>(v, t.padded / 32, d, p, out);
    if (d < dim) accumulate_dims<kVecs, 1>(v, t.padded / 32, d, p, out);
  }

  template <int kVecs, int kDimTiles>
  static SPECDEC_INLINE void accumulate_dims(const float* v, int steps, int d, const float* p, float* out) {
    constexpr int kRowBytes = kVecs * kWidth * 4;
    float* to = out + size_t(d) * kVecs * kWidth;
    const char* a = reinterpret_cast<const char*>(v) + size_t(d / 16) * steps * 1024;
    _tile_loadd(0, to, kRowBytes);
    if (kDimTiles == 2) _tile_loadd(1, to + 16 * kVecs * kWidth, kRowBytes);
    if (kVecs == 2) _tile_loadd(2, to + kWidth, kRowBytes);
    if (kVecs == 2 && kDimTiles == 2) _tile_loadd(3, to + 16 * kVecs * kWidth + kWidth, kRowBytes);
    for (int step = 0; step < steps; step++) {
      const float* columns = p + size_t(step) * 16 * kVecs * kWidth;
      _tile_loadd(4, a + step * 1024, 64);
      _tile_loadd(6, columns, kRowBytes);
      _tile_dpbf16ps(0, 4, 6);
      if (kDimTiles == 2) {
        _tile_loadd(5, a + (steps + step) * 1024, 64);
        _tile_dpbf16ps(1, 5, 6);
      }
      if (kVecs == 2) {
        _tile_loadd(7, columns + kWidth, kRowBytes);
        _tile_dpbf16ps(2, 4, 7);
        if (kDimTiles == 2) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, to, kRowBytes);
    if (kDimTiles == 2) _tile_stored(1, to + 16 * kVecs * kWidth, kRowBytes);
    if (kVecs == 2) _tile_stored(2, to + kWidth, kRowBytes);
    if (kVecs == 2 && kDimTiles == 2) _tile_stored(3, to + 16 * kVecs * kWidth + kWidth, kRowBytes);
  }

  template <int kVecs>
  static void weigh(const float* s, int slots, Vec scale, const Vec (&minus_max)[kVecs], float* p, Vec (&sum)[kVecs]) {
    weigh_pairs<kVecs>(s, slots, scale, minus_max, p, sum);
  }
};

}  // namespace specdec::SPECDEC_ISA

#endif

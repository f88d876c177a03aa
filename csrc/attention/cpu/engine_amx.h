// The engine that multiplies with AMX matrix tiles: sixteen slots by sixteen rows, thirty-two bfloat16 deep.
//
// A tile register holds 16 rows of 64 bytes. Scores: C [16 slots][16 rows] += A [16 slots][32 dims] B [16 dim pairs]
// [16 rows]. A is K as it lies in the cache, loaded at the cache's stride; B is the packed Q. Outputs: C [16 dims]
// [16 rows] += A [16 dims][32 slots] B [16 slot pairs][16 rows]. B is the weights as the softmax leaves them; A is V
// transposed, which is the one repacking per tile of slots (12 cycles a slot at dim 128, shared by all row blocks).
// Two by two tiles are multiplied per step, so each tile that is loaded is used twice.
#pragma once

#include "attention/cpu/engine_fma.h"

#if defined(__AMX_BF16__)

namespace specdec::cpu::SPECDEC_ISA {

// The compiler does not know that the tile instructions read memory (GCC's intrinsics don't say so): stores before them
// could be delayed past them, or dropped. This orders them.
static SPECDEC_INLINE void complete_stores() { __asm__ volatile("" ::: "memory"); }

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The accumulators are tile registers 0 to 3: by group of sixteen slots (or dims), then by vector of rows; with four
// vectors there is one group. Registers 4 and 5 hold the groups' left factors, 6 and 7 pass the columns through.
template <int kRegister>
static SPECDEC_INLINE void load_tile(const void* from, int64_t stride) {
  if constexpr (kRegister == 0) _tile_loadd(0, from, stride);
  if constexpr (kRegister == 1) _tile_loadd(1, from, stride);
  if constexpr (kRegister == 2) _tile_loadd(2, from, stride);
  if constexpr (kRegister == 3) _tile_loadd(3, from, stride);
  if constexpr (kRegister == 4) _tile_loadd(4, from, stride);
  if constexpr (kRegister == 5) _tile_loadd(5, from, stride);
}

template <int kCount>
static SPECDEC_INLINE void zero_tiles() {
  _tile_zero(0);
  if constexpr (kCount > 1) _tile_zero(1);
  if constexpr (kCount > 2) _tile_zero(2);
  if constexpr (kCount > 3) _tile_zero(3);
}

// Where accumulator n lies in a block of rows [16 * groups][vecs * 16].
template <int kVecs>
static SPECDEC_INLINE constexpr size_t tile_offset(int n) {
  return size_t(n / kVecs) * 16 * kVecs * kWidth + n % kVecs * kWidth;
}

template <int kGroups, int kVecs>
static SPECDEC_INLINE void load_tiles(const float* from, int64_t stride) {
  load_tile<0>(from, stride);
  if constexpr (kGroups * kVecs > 1) load_tile<1>(from + tile_offset<kVecs>(1), stride);
  if constexpr (kGroups * kVecs > 2) load_tile<2>(from + tile_offset<kVecs>(2), stride);
  if constexpr (kGroups * kVecs > 3) load_tile<3>(from + tile_offset<kVecs>(3), stride);
}

template <int kGroups, int kVecs>
static SPECDEC_INLINE void store_tiles(float* to, int64_t stride) {
  _tile_stored(0, to, stride);
  if constexpr (kGroups * kVecs > 1) _tile_stored(1, to + tile_offset<kVecs>(1), stride);
  if constexpr (kGroups * kVecs > 2) _tile_stored(2, to + tile_offset<kVecs>(2), stride);
  if constexpr (kGroups * kVecs > 3) _tile_stored(3, to + tile_offset<kVecs>(3), stride);
}

// Accumulators += left factors times sixteen pairs of columns.
template <int kGroups, int kVecs>
static SPECDEC_INLINE void multiply_columns(const float* columns, int64_t stride) {
  _tile_loadd(6, columns, stride);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kGroups == 2 && kVecs == 1) _tile_dpbf16ps(1, 5, 6);
  if constexpr (kGroups == 2 && kVecs == 2) _tile_dpbf16ps(2, 5, 6);
  if constexpr (kVecs >= 2) {
    _tile_loadd(7, columns + kWidth, stride);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kGroups == 2) _tile_dpbf16ps(3, 5, 7);
  }
  if constexpr (kVecs == 4) {
    _tile_loadd(6, columns + 2 * kWidth, stride);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(7, columns + 3 * kWidth, stride);
    _tile_dpbf16ps(3, 4, 7);
  }
}

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
struct AmxEngine {
  using Storage = BFloat16;
  using Element = uint16_t;
  using Output = ColumnOutput;
  static constexpr bool kQueriesByRow = false;
  static SPECDEC_INLINE size_t weights_offset(int slot, int vecs) { return size_t(slot) / 2 * vecs * kWidth; }
  static constexpr int kPairs = 2, kWeightFloats = 1, kMaxVecs = 4, kTile = kTileValue, kSpan = 64, kStep = 32;

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

  // Sixteen slots' dims, from the cache or, past the last multiple of 32, from the padded copy.
  template <int kRegister>
  static SPECDEC_INLINE void load_keys(const Tile<Element, kTile>& t, int slot, int step, int dim, const float* tail) {
    const Group<Element>& keys = t.k[slot / kGroupSlots];
    const bool whole = step * 32 + 32 <= dim;
    const void* from = whole ? static_cast<const void*>(keys.base + step * 32) : tail + size_t(slot) * 16;
    load_tile<kRegister>(from, whole ? keys.stride * 2 : 64);
  }

  // S^T of slots [from, to). Two groups of slots by one or two of rows, or one by four: each tile of K that comes from
  // the second-level cache is then multiplied four times.
  template <int kVecs>
  static void scores(const Tile<Element, kTile>& t, int from, int to, int dim, const float* q, const float* tail,
                     float* s) {
    complete_stores();
    constexpr int kGroups = kVecs == 4 ? 1 : 2, kRowBytes = kVecs * kWidth * 4;
    const int steps = round_up(dim, 32) / 32;
    for (int i = from; i < to; i += 16 * kGroups) {
      zero_tiles<kGroups * kVecs>();
      for (int step = 0; step < steps; step++) {
        load_keys<4>(t, i, step, dim, tail);
        if (kGroups == 2) load_keys<5>(t, i + 16, step, dim, tail);
        multiply_columns<kGroups, kVecs>(q + size_t(step) * 16 * kVecs * kWidth, kRowBytes);
      }
      store_tiles<kGroups, kVecs>(s + (i - from) * kVecs * kWidth, kRowBytes);
    }
  }

  // Adds V^T P^T of slots [from, to), which are multiples of 32, to the outputs.
  template <int kVecs>
  static void accumulate(const Tile<Element, kTile>& t, int from, int to, const float* v, int dim, const float* p,
                         float* out) {
    complete_stores();
    const int steps = t.padded / 32;
    const char* tiles = reinterpret_cast<const char*>(v);
    int d = 0;
    if (kVecs < 4)
      for (; d + 32 <= dim; d += 32)
        add_dims<kVecs == 4 ? 1 : 2, kVecs>(tiles + size_t(d / 16) * steps * 1024, steps, from / 32, to / 32, p,
                                            out + size_t(d) * kVecs * kWidth);
    for (; d < dim; d += 16)
      add_dims<1, kVecs>(tiles + size_t(d / 16) * steps * 1024, steps, from / 32, to / 32, p,
                         out + size_t(d) * kVecs * kWidth);
  }

  template <int kGroups, int kVecs>
  static SPECDEC_INLINE void add_dims(const char* v, int steps, int from, int to, const float* p, float* out) {
    constexpr int kRowBytes = kVecs * kWidth * 4;
    load_tiles<kGroups, kVecs>(out, kRowBytes);
    for (int step = from; step < to; step++) {
      load_tile<4>(v + step * 1024, 64);
      if (kGroups == 2) load_tile<5>(v + (steps + step) * 1024, 64);
      multiply_columns<kGroups, kVecs>(p + size_t(step) * 16 * kVecs * kWidth, kRowBytes);
    }
    store_tiles<kGroups, kVecs>(out, kRowBytes);
  }

  template <int kVecs>
  static void weigh(const float* s, int slots, Vec scale, const Vec (&minus_max)[kVecs], float* p, Vec (&sum)[kVecs]) {
    weigh_pairs<kVecs>(s, slots, scale, minus_max, p, sum);
  }
};

}  // namespace specdec::cpu::SPECDEC_ISA

#endif

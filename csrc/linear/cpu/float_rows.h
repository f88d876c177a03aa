// Rows in float32, or in bfloat16 where the processor multiplies pairs of it, times weights that are multiplied as they
// lie, or are widened to float32 a piece at a time, in the first-level cache.
#pragma once

#include "linear/cpu/row_lanes.h"

namespace specdec::cpu::SPECDEC_ISA {

// kChunk bytes in each row's place.
static SPECDEC_INLINE Vec broadcast_chunk(const char* at) {
#if defined(__AVX512F__)
  return _mm512_broadcast_f32x4(_mm_loadu_ps(reinterpret_cast<const float*>(at)));
#elif defined(__AVX2__)
  return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(at));
#else
  Vec v;
  __builtin_memcpy(&v, at, kChunk);
  __builtin_memcpy(reinterpret_cast<char*>(&v) + kChunk, at, kChunk);
  return v;
#endif
}

// kWidth elements as they are multiplied, and fewer of them with zeros behind.
template <class Storage>
struct Line {
  static constexpr int kBytes = kWidth * int(sizeof(typename Storage::Element)), kChunks = kWidth / 4;
  static SPECDEC_INLINE Vec at(const char* from) {
    return Storage::load_vec(reinterpret_cast<const typename Storage::Element*>(from));
  }
  static SPECDEC_INLINE Vec some(const char* from, int bytes) {
    alignas(64) char copy[kBytes] = {};
    __builtin_memcpy(copy, from, bytes);
    return at(copy);
  }
};

#if defined(__AVX2__)
// A single row (kOneRowAlone): each sum is that of multiply_chunks, in its order.
template <class Multiplier, class From>
static void multiply_chunks_with_one(const WeightRows<kStreams>& weights, const char* rows, int chunks, float* kept,
                                     bool begin) {
  constexpr int kAtOnce = From::kChunks;
  Vec sum[kOneRowVectors];
  SPECDEC_UNROLL
  for (int v = 0; v < kOneRowVectors; v++) sum[v] = splat(0.0f);
  const auto add = [&](const Vec(&line)[kStreams], int count) __attribute__((always_inline)) {
    Vec of_chunk[kAtOnce][kOneRowVectors];
    chunks_of(line, of_chunk);
    SPECDEC_UNROLL
    for (int i = 0; i < kAtOnce; i++) {
      if (i >= count) break;
      const Vec row = broadcast_chunk(rows + i * kChunk);
      SPECDEC_UNROLL
      for (int v = 0; v < kOneRowVectors; v++) sum[v] = Multiplier::apply(sum[v], of_chunk[i][v], row);
    }
  };
  int64_t offset = 0;
  Vec line[kStreams];
  for (; chunks >= kAtOnce; chunks -= kAtOnce, offset += From::kBytes, rows += kAtOnce * kChunk) {
    if (weights.ahead && offset % kLine == 0) {
      SPECDEC_UNROLL
      for (int k = 0; k < kStreams; k++) weights.fetch(k, offset);
    }
    SPECDEC_UNROLL
    for (int k = 0; k < kStreams; k++) line[k] = From::at(weights.row[k] + offset);
    add(line, kAtOnce);
  }
  if (chunks > 0) {
    const int bytes = From::kBytes / kAtOnce * chunks;
    for (int k = 0; k < kStreams; k++) line[k] = From::some(weights.row[k] + offset, bytes);
    add(line, chunks);
  }
  keep(kept, sums_of_one(sum), begin);
}
#endif

// Floating-point sums of a piece; Multiplier::apply(sum, weights, rows) multiplies a chunk's dims.
template <class Multiplier, int kSome, int kVectors>
static void multiply_chunks(const WeightRows<kSome>& weights, const char* rows, int chunks, float* kept, bool begin) {
#if defined(__AVX2__)
  if constexpr (kSome == kStreams && kVectors == 1) {
    if (weights.one_row) return multiply_chunks_with_one<Multiplier, Line<Float32>>(weights, rows, chunks, kept, begin);
  }
#endif
  Vec sum[kSome][kVectors];
  SPECDEC_UNROLL
  for (int k = 0; k < kSome; k++) {
    SPECDEC_UNROLL
    for (int v = 0; v < kVectors; v++) sum[k][v] = splat(0.0f);
  }
  const auto add = [&](int offset, const char* at) __attribute__((always_inline)) {
    Vec row[kVectors];
    SPECDEC_UNROLL
    for (int v = 0; v < kVectors; v++) row[v] = load(reinterpret_cast<const float*>(at + v * kVectorBytes));
    SPECDEC_UNROLL
    for (int k = 0; k < kSome; k++) {
      const Vec weight = broadcast_chunk(weights.row[k] + offset);
      SPECDEC_UNROLL
      for (int v = 0; v < kVectors; v++) sum[k][v] = Multiplier::apply(sum[k][v], weight, row[v]);
    }
  };
  constexpr int kChunks = kLine / kChunk;
  int chunk = 0;
  for (; chunk + kChunks <= chunks; chunk += kChunks, rows += kChunks * kVectors * kVectorBytes) {
    if (weights.ahead) {
      SPECDEC_UNROLL
      for (int k = 0; k < kSome; k++) weights.fetch(k, chunk * kChunk);
    }
    SPECDEC_UNROLL
    for (int i = 0; i < kChunks; i++) add((chunk + i) * kChunk, rows + i * kVectors * kVectorBytes);
  }
  for (; chunk < chunks; chunk++, rows += kVectors * kVectorBytes) add(chunk * kChunk, rows);
  SPECDEC_UNROLL
  for (int v = 0; v < kVectors; v++) {
    SPECDEC_UNROLL
    for (int k = 0; k < kSome; k += 4, kept += kWidth) {
      keep(kept, sums_of_four(sum[k][v], sum[k + 1][v], sum[k + 2][v], sum[k + 3][v]), begin);
    }
  }
}

// A last chunk that is not whole must not be read beyond the row's end: the piece is copied, and ends with zeros.
template <int kBytes>
struct CopiedPiece {
  alignas(64) char copy[kSlots][kBytes];
  template <int kSome>
  SPECDEC_INLINE void stage(WeightRows<kSome>& weights, int bytes) {
    if (bytes % kChunk == 0) return;
    for (int k = 0; k < kSome; k++) {
      __builtin_memcpy(copy[k], weights.row[k], bytes);
      __builtin_memset(copy[k] + bytes, 0, kChunk - bytes % kChunk);
      weights.row[k] = copy[k];
    }
    weights.ahead = 0;
  }
};

// Rows in float32.
struct FloatRows {
#if defined(__AVX2__)
  static constexpr bool kOneRowAlone = true;
#endif
  static constexpr int kPieceDims = 256, kChunkDims = 4, kMaxVectors = 3;
  static SPECDEC_INLINE int piece_vectors(int dims) { return (dims + kChunkDims - 1) / kChunkDims; }
  static SPECDEC_INLINE int row_vectors(int dim) { return piece_vectors(dim); }
  static SPECDEC_INLINE Vec apply(Vec sum, Vec weight, Vec row) { return fma(weight, row, sum); }
  template <int kSome, int kVectors>
  static void multiply(const WeightRows<kSome>& weights, const char* rows, int dims, float* kept, bool begin) {
    multiply_chunks<FloatRows, kSome, kVectors>(weights, rows, piece_vectors(dims), kept, begin);
  }
  template <class Place, class Pieces>
  static SPECDEC_INLINE void pack(const float* y, const Pieces& pieces, const Place& place, char* packed) {
    for (int piece = 0; piece < pieces.count; piece++) {
      char* to = packed + place.of(pieces, piece);
      const float* from = y + pieces.begin(piece);
      for (int d = 0; d < pieces.dims(piece); d += kChunkDims, to += place.apart) {
        __builtin_memcpy(to, from + d, kChunk);
      }
    }
  }
};

// Weights of float32 as they lie.
struct Float32Form : FloatRows {
  static constexpr int kPieceDims = 640, kLineDims = 16;
  CopiedPiece<4 * kPieceDims + kLine> copied;
  static SPECDEC_INLINE int64_t weight_bytes(int dims) { return 4 * int64_t(dims); }
  template <int kSome>
  SPECDEC_INLINE void stage(WeightRows<kSome>& weights, int dims) {
    copied.stage(weights, 4 * dims);
  }
};

// Weights that are widened: for one row in registers, else a piece at a time.
template <class Storage>
struct WidenedForm : FloatRows {
  static constexpr int kSize = int(sizeof(typename Storage::Element)), kLineDims = 64 / kSize;
  alignas(64) float wide[kSlots][kPieceDims + kWidth];
  static SPECDEC_INLINE int64_t weight_bytes(int dims) { return kSize * int64_t(dims); }
  template <int kSome>
  SPECDEC_INLINE void stage(WeightRows<kSome>& weights, int dims) {
    if (multiplied_as_they_lie(weights, dims)) return;
    using Element = typename Storage::Element;
    for (int k = 0; k < kSome; k++) {
      const auto* from = reinterpret_cast<const Element*>(weights.row[k]);
      int d = 0;
      for (; d + kLineDims <= dims; d += kLineDims) {
        if (weights.ahead) weights.fetch(k, kSize * d);
        SPECDEC_UNROLL
        for (int i = 0; i < kLineDims; i += kWidth) store(wide[k] + d + i, Storage::load_vec(from + d + i));
      }
      for (; d < dims; d += kWidth) {
        Element rest[kWidth] = {};
        __builtin_memcpy(rest, from + d, min_of(kWidth, dims - d) * sizeof(Element));
        store(wide[k] + d, Storage::load_vec(rest));
      }
      weights.row[k] = reinterpret_cast<const char*>(wide[k]);
    }
    weights.ahead = 0;
  }
  template <int kSome>
  static SPECDEC_INLINE bool multiplied_as_they_lie(const WeightRows<kSome>& weights, int dims) {
    return kSome == kStreams && weights.one_row && dims % kChunkDims == 0;
  }
  template <int kSome, int kVectors>
  static void multiply(const WeightRows<kSome>& weights, const char* rows, int dims, float* kept, bool begin) {
#if defined(__AVX2__)
    if constexpr (kSome == kStreams && kVectors == 1) {
      if (multiplied_as_they_lie(weights, dims)) {
        return multiply_chunks_with_one<FloatRows, Line<Storage>>(weights, rows, dims / kChunkDims, kept, begin);
      }
    }
#endif
    FloatRows::multiply<kSome, kVectors>(weights, rows, dims, kept, begin);
  }
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

// The value of a float16.
static SPECDEC_INLINE float value_of_half(const char* at) {
  uint16_t bits[kWidth] = {};
  __builtin_memcpy(bits, at, 2);
#if defined(__AVX2__)
  return _cvtsh_ss(bits[0]);
#else
  return half_to_float(bits[0]);
#endif
}

// kWidth halves of bytes, as numbers: the low ones, or the high ones.
template <bool kHigh>
static SPECDEC_INLINE Vec nibbles(const char* at) {
#if defined(__AVX512F__)
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  return _mm512_cvtepi32_ps(kHigh ? _mm512_srli_epi32(bytes, 4) : _mm512_and_si512(bytes, _mm512_set1_epi32(15)));
#elif defined(__AVX2__)
  const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
  return _mm256_cvtepi32_ps(kHigh ? _mm256_srli_epi32(bytes, 4) : _mm256_and_si256(bytes, _mm256_set1_epi32(15)));
#else
  Vec v;
  for (int i = 0; i < kWidth; i++) v[i] = float(kHigh ? uint8_t(at[i]) >> 4 : uint8_t(at[i]) & 15);
  return v;
#endif
}

// Weights in the blocks of GGUF files, which are widened.
template <WeightType kType>
struct WidenedBlocksForm : FloatRows {
  static constexpr int kLineDims = kBlockElements, kBytes = int(block_bytes(kType));
  alignas(64) float wide[kSlots][kPieceDims];
  static SPECDEC_INLINE int64_t weight_bytes(int dims) { return int64_t(dims / kBlockElements) * kBytes; }
  template <int kSome>
  SPECDEC_INLINE void stage(WeightRows<kSome>& weights, int dims) {
    for (int k = 0; k < kSome; k++) {
      const char* from = weights.row[k];
      for (int d = 0; d < dims; d += kBlockElements, from += kBytes) {
        if (weights.ahead) weights.fetch(k, from - weights.row[k]);
        const Vec scale = splat(value_of_half(from));
        if (kType == WeightType::kQ80) {
          SPECDEC_UNROLL
          for (int i = 0; i < kBlockElements; i += kWidth) {
            store(wide[k] + d + i, scale * Int8::load_vec(reinterpret_cast<const int8_t*>(from + 2 + i)));
          }
        } else {
          const bool least = kType == WeightType::kQ41;
          const Vec from_zero = least ? splat(value_of_half(from + 2)) : splat(-8.0f) * scale;
          SPECDEC_UNROLL
          for (int i = 0; i < 16; i += kWidth) {
            const char* at = from + (least ? 4 : 2) + i;
            store(wide[k] + d + i, fma(scale, nibbles<false>(at), from_zero));
            store(wide[k] + d + 16 + i, fma(scale, nibbles<true>(at), from_zero));
          }
        }
      }
      weights.row[k] = reinterpret_cast<const char*>(wide[k]);
    }
    weights.ahead = 0;
  }
};

#if defined(__AVX512BF16__)
// Weights and rows in bfloat16, multiplied in pairs. Rows are rounded to it, as PyTorch does before such a weight.
struct PairsForm {
  static constexpr bool kOneRowAlone = true;
  static constexpr int kPieceDims = 1280, kChunkDims = 8, kLineDims = 32, kMaxVectors = 3;
  CopiedPiece<2 * kPieceDims + kLine> copied;
  static SPECDEC_INLINE int piece_vectors(int dims) { return (dims + kChunkDims - 1) / kChunkDims; }
  static SPECDEC_INLINE int row_vectors(int dim) { return piece_vectors(dim); }
  static SPECDEC_INLINE int64_t weight_bytes(int dims) { return 2 * int64_t(dims); }
  template <int kSome>
  SPECDEC_INLINE void stage(WeightRows<kSome>& weights, int dims) {
    copied.stage(weights, 2 * dims);
  }
  static SPECDEC_INLINE Vec apply(Vec sum, Vec weight, Vec row) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)row);
  }
  template <int kSome, int kVectors>
  static void multiply(const WeightRows<kSome>& weights, const char* rows, int dims, float* kept, bool begin) {
    multiply_chunks<PairsForm, kSome, kVectors>(weights, rows, piece_vectors(dims), kept, begin);
  }
  template <class Place, class Pieces>
  static SPECDEC_INLINE void pack(const float* y, const Pieces& pieces, const Place& place, char* packed) {
    for (int piece = 0; piece < pieces.count; piece++) {
      char* to = packed + place.of(pieces, piece);
      const float* from = y + pieces.begin(piece);
      const int dims = pieces.dims(piece);
      for (int d = 0; d < dims; d += kWidth, to += 2 * place.apart) {
        uint16_t rounded[kWidth];
        store_bf16(rounded, load(from + d));
        __builtin_memcpy(to, rounded, kChunk);
        if (d + kChunkDims < dims) __builtin_memcpy(to + place.apart, rounded + kChunkDims, kChunk);
      }
    }
  }
};
#endif

}  // namespace specdec::cpu::SPECDEC_ISA

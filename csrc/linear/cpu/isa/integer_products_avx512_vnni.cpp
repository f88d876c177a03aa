// Int8 weights, and blocks of them, times rows in exact integers of 16 bits (linear/cpu/integer_rows.h), by AVX-512's
// dot products of bytes. Lanes: linear/cpu/row_lanes.h. Blocks of four bits: nibble_products_avx512_vnni.cpp.
//
// High bytes are multiplied first, their sums shifted by eight bits, and low bytes added to the same sums. A lane takes
// at most 160 dims of a piece, so nothing leaves 32 bits. The sums of an int8 piece become float32 once. Those of a block
// do so too, times the block's scale; a piece of blocks is summed in order, and scaled by the row's scale in the end.
#define SPECDEC_ISA avx512_vnni
#include "linear/cpu/integer_rows.h"
#include "linear/cpu/row_lanes.h"

namespace specdec::cpu::avx512_vnni {

// Four sums of four neighbouring integers, as a lane takes them.
static SPECDEC_INLINE __m128i sums_of_fours(__m512i v) {
  const __m512i pairs = _mm512_add_epi32(v, _mm512_shuffle_epi32(v, _MM_PERM_ENUM(0xb1)));
  const __m512i fours = _mm512_add_epi32(pairs, _mm512_shuffle_epi32(pairs, _MM_PERM_ENUM(0x4e)));
  return _mm512_castsi512_si128(
      _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), fours));
}

static SPECDEC_INLINE __m512i vector_at(const char* at) { return _mm512_loadu_si512(at); }
static SPECDEC_INLINE __m512i chunk_at(const char* at) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}
static SPECDEC_INLINE __m512i flipped(__m512i v) { return _mm512_xor_si512(v, _mm512_set1_epi8(-128)); }

// A packed piece: what is too much, the scale, the high bytes, the low bytes.
struct Int8Form {
  static constexpr bool kOneRowAlone = true;
  static constexpr int kPieceDims = 640, kLineDims = 64, kMaxVectors = 3;
  alignas(64) char copy[kSlots][kPieceDims];

  static SPECDEC_INLINE int chunks_of(int dims) { return (dims + kChunk - 1) / kChunk; }
  static SPECDEC_INLINE int piece_vectors(int dims) { return 2 + 2 * chunks_of(dims); }
  static SPECDEC_INLINE int row_vectors(int dim) { return 2 * Pieces<Int8Form>(dim).count + 2 * chunks_of(dim); }
  static SPECDEC_INLINE int64_t weight_bytes(int dims) { return dims; }

  template <int kSome>
  SPECDEC_INLINE void stage(WeightRows<kSome>& weights, int dims) {
    if (dims % kChunk == 0) return;
    for (int k = 0; k < kSome; k++) {
      __builtin_memset(copy[k] + dims / kChunk * kChunk, 0, kChunk);
      __builtin_memcpy(copy[k], weights.row[k], dims);
      weights.row[k] = copy[k];
    }
    weights.ahead = 0;
  }

  static SPECDEC_INLINE void pack(const float* y, const Pieces<Int8Form>& pieces, const RowPlace<Int8Form>& place,
                                  char* packed) {
    for (int piece = 0; piece < pieces.count; piece++) {
      char* to = packed + place.of(pieces, piece);
      const float* from = y + pieces.begin(piece);
      const int dims = pieces.dims(piece), chunks = chunks_of(dims);
      const Rounding rounding = rounding_of(from, dims);
      __m128i sum = _mm_setzero_si128();
      for (int chunk = 0; chunk < chunks; chunk++) {
        const Bytes bytes(rounding, from + chunk * kChunk);
        put(to + (2 + chunk) * place.apart, bytes.high);
        put(to + (2 + chunks + chunk) * place.apart, bytes.low);
        sum = _mm_add_epi32(sum, sums_of_fours(bytes.whole));
      }
      put(to, _mm_mullo_epi32(sum, _mm_set1_epi32(-128)));
      put(to + place.apart, _mm_castps_si128(_mm_set1_ps(rounding.scale)));
    }
  }

  // A single row: lanes of other rows go to other rows of the weights.
  static SPECDEC_INLINE void multiply_one(const WeightRows<kStreams>& weights, const char* rows, int dims, float* kept,
                                          bool begin) {
    const int chunks = chunks_of(dims);
    const char *high_bytes = rows + 2 * kChunk, *low_bytes = high_bytes + chunks * kChunk;
    __m512i high = _mm512_setzero_si512(), low = _mm512_setzero_si512();
    const auto add = [&](Vec of_chunk, int chunk) __attribute__((always_inline)) {
      const __m512i weight = flipped(_mm512_castps_si512(of_chunk));
      high = _mm512_dpbusd_epi32(high, weight, chunk_at(high_bytes + chunk * kChunk));
      low = _mm512_dpbusd_epi32(low, weight, chunk_at(low_bytes + chunk * kChunk));
    };
    int chunk = 0;
    for (; chunk + kLaneRows <= chunks; chunk += kLaneRows) {
      Vec line[kStreams], of_chunk[kLaneRows][kOneRowVectors];
      SPECDEC_UNROLL
      for (int k = 0; k < kStreams; k++) {
        if (weights.ahead) weights.fetch(k, chunk * kChunk);
        line[k] = load(reinterpret_cast<const float*>(weights.row[k] + chunk * kChunk));
      }
      avx512_vnni::chunks_of(line, of_chunk);
      SPECDEC_UNROLL
      for (int i = 0; i < kLaneRows; i++) add(of_chunk[i][0], chunk + i);
    }
    for (; chunk < chunks; chunk++) {
      alignas(64) char of_chunk[kVectorBytes];
      for (int k = 0; k < kStreams; k++)
        __builtin_memcpy(of_chunk + k * kChunk, weights.row[k] + chunk * kChunk, kChunk);
      add(load(reinterpret_cast<const float*>(of_chunk)), chunk);
    }
    const __m512i whole = _mm512_add_epi32(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low), chunk_at(rows));
    const Vec sum[kOneRowVectors] = {_mm512_cvtepi32_ps(whole)};
    const Vec sums = sums_of_one(sum), scale = _mm512_castsi512_ps(chunk_at(rows + kChunk));
    store(kept, begin ? sums * scale : fma(sums, scale, load(kept)));
  }

  // With few sums high and low bytes have their own, so that more of them are under way, and weights are loaded once.
  template <int kSome, int kVectors>
  static SPECDEC_INLINE void multiply_both(const WeightRows<kSome>& weights, const char* rows, int dims, float* kept,
                                           bool begin) {
    const int chunks = chunks_of(dims);
    const char* bytes = rows + 2 * kVectors * kVectorBytes;
    const int64_t apart = int64_t(chunks) * kVectors * kVectorBytes;
    __m512i high[kSome][kVectors], low[kSome][kVectors];
    SPECDEC_UNROLL
    for (int k = 0; k < kSome; k++) {
      SPECDEC_UNROLL
      for (int v = 0; v < kVectors; v++) high[k][v] = low[k][v] = _mm512_setzero_si512();
    }
    const auto add = [&](int offset, const char* at) __attribute__((always_inline)) {
      SPECDEC_UNROLL
      for (int k = 0; k < kSome; k++) {
        const __m512i weight = flipped(chunk_at(weights.row[k] + offset));
        SPECDEC_UNROLL
        for (int v = 0; v < kVectors; v++) {
          high[k][v] = _mm512_dpbusd_epi32(high[k][v], weight, vector_at(at + v * kVectorBytes));
          low[k][v] = _mm512_dpbusd_epi32(low[k][v], weight, vector_at(at + apart + v * kVectorBytes));
        }
      }
    };
    constexpr int kChunks = kLine / kChunk;
    int chunk = 0;
    for (; chunk + kChunks <= chunks; chunk += kChunks, bytes += kChunks * kVectors * kVectorBytes) {
      if (weights.ahead) {
        SPECDEC_UNROLL
        for (int k = 0; k < kSome; k++) weights.fetch(k, chunk * kChunk);
      }
      SPECDEC_UNROLL
      for (int i = 0; i < kChunks; i++) add((chunk + i) * kChunk, bytes + i * kVectors * kVectorBytes);
    }
    for (; chunk < chunks; chunk++, bytes += kVectors * kVectorBytes) add(chunk * kChunk, bytes);
    SPECDEC_UNROLL
    for (int v = 0; v < kVectors; v++) {
      SPECDEC_UNROLL
      for (int k = 0; k < kSome; k += 4, kept += kWidth) {
        __m512i sum[4];
        SPECDEC_UNROLL
        for (int i = 0; i < 4; i++) {
          sum[i] = _mm512_add_epi32(_mm512_slli_epi32(high[k + i][v], 8), low[k + i][v]);
        }
        put_sums(sum[0], sum[1], sum[2], sum[3], rows, kVectors, v, kept, begin);
      }
    }
  }

  // Makes numbers of a piece's integer sums with vector v of the rows, and adds them to what is kept.
  static SPECDEC_INLINE void put_sums(__m512i a, __m512i b, __m512i c, __m512i d, const char* rows, int vectors, int v,
                                      float* kept, bool begin) {
    const __m512i too_much = vector_at(rows + v * kVectorBytes);
    const auto whole = [&](__m512i sum) __attribute__((always_inline)) {
      return _mm512_cvtepi32_ps(_mm512_add_epi32(sum, too_much));
    };
    const Vec sums = sums_of_four(whole(a), whole(b), whole(c), whole(d));
    const Vec scale = load(reinterpret_cast<const float*>(rows + (vectors + v) * kVectorBytes));
    store(kept, begin ? sums * scale : fma(sums, scale, load(kept)));
  }

  template <int kSome, int kVectors>
  static void multiply(const WeightRows<kSome>& weights, const char* rows, int dims, float* kept, bool begin) {
    if constexpr (kSome == kStreams && kVectors == 1) {
      if (weights.one_row) return multiply_one(weights, rows, dims, kept, begin);
    }
    if (kSome == kStreams && kVectors < 3) return multiply_both<kSome, kVectors>(weights, rows, dims, kept, begin);
    const int chunks = chunks_of(dims);
    const char* bytes = rows + 2 * kVectors * kVectorBytes;
    __m512i sum[kSome][kVectors];
    SPECDEC_UNROLL
    for (int k = 0; k < kSome; k++) {
      SPECDEC_UNROLL
      for (int v = 0; v < kVectors; v++) sum[k][v] = _mm512_setzero_si512();
    }
    const auto add = [&](int offset, const char* at) __attribute__((always_inline)) {
      SPECDEC_UNROLL
      for (int k = 0; k < kSome; k++) {
        const __m512i weight = flipped(chunk_at(weights.row[k] + offset));
        SPECDEC_UNROLL
        for (int v = 0; v < kVectors; v++) {
          sum[k][v] = _mm512_dpbusd_epi32(sum[k][v], weight, vector_at(at + v * kVectorBytes));
        }
      }
    };
    constexpr int kChunks = kLine / kChunk;
    bool fetch = weights.ahead != 0;
    for (int half = 0;; half++) {
      int chunk = 0;
      for (; chunk + kChunks <= chunks; chunk += kChunks, bytes += kChunks * kVectors * kVectorBytes) {
        if (fetch) {
          SPECDEC_UNROLL
          for (int k = 0; k < kSome; k++) weights.fetch(k, chunk * kChunk);
        }
        SPECDEC_UNROLL
        for (int i = 0; i < kChunks; i++) add((chunk + i) * kChunk, bytes + i * kVectors * kVectorBytes);
      }
      for (; chunk < chunks; chunk++, bytes += kVectors * kVectorBytes) add(chunk * kChunk, bytes);
      if (half == 1) break;
      fetch = false;
      SPECDEC_UNROLL
      for (int k = 0; k < kSome; k++) {
        SPECDEC_UNROLL
        for (int v = 0; v < kVectors; v++) sum[k][v] = _mm512_slli_epi32(sum[k][v], 8);
      }
    }
    SPECDEC_UNROLL
    for (int v = 0; v < kVectors; v++) {
      SPECDEC_UNROLL
      for (int k = 0; k < kSome; k += 4, kept += kWidth) {
        put_sums(sum[k][v], sum[k + 1][v], sum[k + 2][v], sum[k + 3][v], rows, kVectors, v, kept, begin);
      }
    }
  }
};

// Blocks of q8_0. A packed piece: the scale, then for each block two vectors of high bytes, two of low ones, and what is
// too much.
struct BlocksForm {
  static constexpr int kPieceDims = 512, kLineDims = kBlockElements, kBlockVectors = 5, kMaxVectors = 2;
  static constexpr int kBytes = int(block_bytes(WeightType::kQ80)), kHead = 2;

  static SPECDEC_INLINE int piece_vectors(int dims) { return 1 + kBlockVectors * (dims / kBlockElements); }
  static SPECDEC_INLINE int row_vectors(int dim) {
    return Pieces<BlocksForm>(dim).count + kBlockVectors * (dim / kBlockElements);
  }
  static SPECDEC_INLINE int64_t weight_bytes(int dims) { return int64_t(dims / kBlockElements) * kBytes; }
  template <int kSome>
  static SPECDEC_INLINE void stage(WeightRows<kSome>&, int) {}

  static SPECDEC_INLINE void pack(const float* y, const Pieces<BlocksForm>& pieces, const RowPlace<BlocksForm>& place,
                                  char* packed) {
    for (int piece = 0; piece < pieces.count; piece++) {
      char* to = packed + place.of(pieces, piece);
      const float* from = y + pieces.begin(piece);
      const int dims = pieces.dims(piece);
      const Rounding rounding = rounding_of(from, dims);
      put(to, _mm_castps_si128(_mm_set1_ps(rounding.scale)));
      to += place.apart;
      for (int d = 0; d < dims; d += kBlockElements, to += kBlockVectors * place.apart) {
        const Bytes first(rounding, from + d), second(rounding, from + d + 16);
        put(to, first.high);
        put(to + place.apart, second.high);
        put(to + 2 * place.apart, first.low);
        put(to + 3 * place.apart, second.low);
        const __m128i sum = _mm_add_epi32(sums_of_fours(first.whole), sums_of_fours(second.whole));
        put(to + 4 * place.apart, _mm_mullo_epi32(sum, _mm_set1_epi32(-128)));
      }
    }
  }

  static SPECDEC_INLINE Vec half_at(const char* at) {
    uint16_t bits;
    __builtin_memcpy(&bits, at, 2);
    return _mm512_cvtph_ps(_mm256_set1_epi16(short(bits)));
  }

  template <int kSome, int kVectors>
  static void multiply(const WeightRows<kSome>& weights, const char* rows, int dims, float* kept, bool begin) {
    Vec sum[kSome][kVectors];
    SPECDEC_UNROLL
    for (int k = 0; k < kSome; k++) {
      SPECDEC_UNROLL
      for (int v = 0; v < kVectors; v++) sum[k][v] = splat(0.0f);
    }
    const char* at = rows + kVectors * kVectorBytes;
    const auto part = [&](int i, int v)
                          __attribute__((always_inline)) { return vector_at(at + (i * kVectors + v) * kVectorBytes); };
    const int64_t bytes = weight_bytes(dims);
    for (int64_t offset = 0; offset < bytes; offset += kBytes, at += kBlockVectors * kVectors * kVectorBytes) {
      SPECDEC_UNROLL
      for (int k = 0; k < kSome; k++) {
        const char* block = weights.row[k] + offset;
        if (weights.ahead) weights.fetch(k, offset);
        const Vec scale = half_at(block);
        const __m512i first = flipped(chunk_at(block + kHead)), second = flipped(chunk_at(block + kHead + kChunk));
        SPECDEC_UNROLL
        for (int v = 0; v < kVectors; v++) {
          __m512i whole = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first, part(0, v));
          whole = _mm512_slli_epi32(_mm512_dpbusd_epi32(whole, second, part(1, v)), 8);
          whole = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(whole, first, part(2, v)), second, part(3, v));
          whole = _mm512_add_epi32(whole, part(4, v));
          sum[k][v] = fma(scale, _mm512_cvtepi32_ps(whole), sum[k][v]);
        }
      }
    }
    SPECDEC_UNROLL
    for (int v = 0; v < kVectors; v++) {
      const Vec scale = load(reinterpret_cast<const float*>(rows + v * kVectorBytes));
      SPECDEC_UNROLL
      for (int k = 0; k < kSome; k += 4, kept += kWidth) {
        const Vec sums = sums_of_four(sum[k][v], sum[k + 1][v], sum[k + 2][v], sum[k + 3][v]);
        store(kept, begin ? sums * scale : fma(sums, scale, load(kept)));
      }
    }
  }
};

double rounding_error(const float* y, int dim) {
  const Pieces<Int8Form> pieces(dim);
  __m512d squares = _mm512_setzero_pd();
  for (int piece = 0; piece < pieces.count; piece++) {
    const int begin = pieces.begin(piece), end = begin + pieces.dims(piece);
    const Rounding rounding = rounding_of(y + begin, end - begin);
    const __m512d scale = _mm512_set1_pd(rounding.scale);
    for (int d = begin; d < end; d += kWidth) {
      const __m512i whole = rounding.inverse > 0 ? rounding.apply(load(y + d)) : _mm512_setzero_si512();
      const Vec exact = _mm512_cvtepi32_ps(whole);  // 16 bits
      const __m512d low = Rounding::low_half(load(y + d)) - scale * Rounding::low_half(exact);
      const __m512d high = Rounding::high_half(load(y + d)) - scale * Rounding::high_half(exact);
      squares = squares + low * low + high * high;
    }
  }
  return __builtin_sqrt(_mm512_reduce_add_pd(squares));
}

const ProductForm kInt8Form = form_of<Int8Form>();
const ProductForm kQ80Form = form_of<BlocksForm>();

}  // namespace specdec::cpu::avx512_vnni

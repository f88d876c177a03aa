// Int8 weights and the blocks of GGUF files times rows in exact integers, by AVX-512's dot products of bytes.
//
// A piece of a row becomes integers of 16 bits and a scale, scale * (256 * high + low) with both bytes from -128 to 127:
// it is off by at most half of the piece's greatest size over 32,639. vpdpbusd multiplies unsigned bytes with signed
// ones and adds four products, so the weights take the unsigned side: an int8 with its top bit turned over is w + 128,
// half a byte is q as it lies, and what is too much, 128 or 8 times the sum of the row's integers, is taken off again
// in each lane. High bytes are multiplied first, their sums shifted by eight bits, and low bytes added to the same
// sums. A lane takes at most 160 dims of a piece, so nothing leaves 32 bits.
//
// The sums of an int8 piece become float32 once. Those of a block do so too, times the block's scale; a piece of blocks
// is summed in order, and scaled by the row's scale in the end. Lanes: linear/cpu/row_lanes.h.
#define SPECDEC_ISA avx512_vnni
#include "linear/cpu/row_lanes.h"

namespace specdec::cpu::avx512_vnni {

constexpr int kMax = 127 * 256 + 127;  // of two bytes

struct Rounding {
  float scale;
  double inverse;  // 0 where nothing is left of the piece, or it is not finite
  SPECDEC_INLINE __m512i apply(Vec y) const {
    const __m512d times = _mm512_set1_pd(inverse);
    const __m256i low = _mm512_cvtpd_epi32(_mm512_mul_pd(low_half(y), times));
    const __m256i high = _mm512_cvtpd_epi32(_mm512_mul_pd(high_half(y), times));
    const __m512i whole = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    return _mm512_max_epi32(_mm512_min_epi32(whole, _mm512_set1_epi32(kMax)), _mm512_set1_epi32(-kMax));
  }
  static SPECDEC_INLINE __m512d low_half(Vec v) { return _mm512_cvtps_pd(_mm512_castps512_ps256(v)); }
  static SPECDEC_INLINE __m512d high_half(Vec v) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)); }
};

// What rounds a finite piece; a scale of NaN where it is not. Zeros follow the piece.
static Rounding rounding_of(const float* y, int dims) {
  Vec most = splat(0.0f);
  __mmask16 finite = 0xffff;
  for (int d = 0; d < dims; d += kWidth) {
    const Vec size = _mm512_abs_ps(load(y + d));
    finite &= _mm512_cmp_ps_mask(size, splat(__builtin_inff()), _CMP_LT_OQ);
    most = _mm512_max_ps(size, most);
  }
  if (finite != 0xffff) return {__builtin_nanf(""), 0.0};
  const float scale = _mm512_reduce_max_ps(most) / kMax;
  return {scale, scale > 0 ? 1.0 / scale : 0.0};
}

// Sixteen dims: their integers, and the two bytes of each.
struct Bytes {
  __m512i whole;
  __m128i high, low;
  SPECDEC_INLINE Bytes(const Rounding& rounding, const float* y) {
    whole = rounding.inverse > 0 ? rounding.apply(load(y)) : _mm512_setzero_si512();
    const __m512i signed_low = _mm512_srai_epi32(_mm512_slli_epi32(whole, 24), 24);
    high = _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_sub_epi32(whole, signed_low), 8));
    low = _mm512_cvtepi32_epi8(signed_low);
  }
};

// Four sums of four neighbouring integers, as a lane takes them.
static SPECDEC_INLINE __m128i sums_of_fours(__m512i v) {
  const __m512i pairs = _mm512_add_epi32(v, _mm512_shuffle_epi32(v, _MM_PERM_ENUM(0xb1)));
  const __m512i fours = _mm512_add_epi32(pairs, _mm512_shuffle_epi32(pairs, _MM_PERM_ENUM(0x4e)));
  return _mm512_castsi512_si128(
      _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), fours));
}

static SPECDEC_INLINE void put(char* to, __m128i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), v); }
static SPECDEC_INLINE __m512i vector_at(const char* at) { return _mm512_loadu_si512(at); }
static SPECDEC_INLINE __m512i chunk_at(const char* at) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}
static SPECDEC_INLINE __m512i flipped(__m512i v) { return _mm512_xor_si512(v, _mm512_set1_epi8(-128)); }

// A packed piece: what is too much, the scale, the high bytes, the low bytes.
struct Int8Form {
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
      for (int k = 0; k < kSome; k++, kept += kWidth) {
        put_sum(_mm512_add_epi32(_mm512_slli_epi32(high[k][v], 8), low[k][v]), rows, kVectors, v, kept, begin);
      }
    }
  }

  // Makes a number of a piece's integer sum with vector v of the rows, and adds it to what is kept.
  static SPECDEC_INLINE void put_sum(__m512i sum, const char* rows, int vectors, int v, float* kept, bool begin) {
    const Vec whole = _mm512_cvtepi32_ps(_mm512_add_epi32(sum, vector_at(rows + v * kVectorBytes)));
    const Vec scale = load(reinterpret_cast<const float*>(rows + (vectors + v) * kVectorBytes));
    store(kept, begin ? whole * scale : fma(whole, scale, load(kept)));
  }

  template <int kSome, int kVectors>
  static void multiply(const WeightRows<kSome>& weights, const char* rows, int dims, float* kept, bool begin) {
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
      for (int k = 0; k < kSome; k++, kept += kWidth) put_sum(sum[k][v], rows, kVectors, v, kept, begin);
    }
  }
};

// A packed piece: the scale, then for each block two vectors of high bytes, two of low ones, and what is too much, or,
// where blocks have a minimum, the sums that it is multiplied with.
template <WeightType kType>
struct BlocksForm {
  static constexpr int kPieceDims = 512, kLineDims = kBlockElements, kBlockVectors = 5, kMaxVectors = 2;
  static constexpr int kBytes = int(block_bytes(kType)), kHead = kType == WeightType::kQ41 ? 4 : 2;

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
        const __m128i too_much = _mm_mullo_epi32(sum, _mm_set1_epi32(kType == WeightType::kQ80 ? -128 : -8));
        put(to + 4 * place.apart, kType == WeightType::kQ41 ? _mm_castps_si128(_mm_cvtepi32_ps(sum)) : too_much);
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
        __m512i first, second;
        if (kType == WeightType::kQ80) {
          first = flipped(chunk_at(block + kHead));
          second = flipped(chunk_at(block + kHead + 16));
        } else {
          const __m512i both = chunk_at(block + kHead), low = _mm512_set1_epi8(15);
          first = _mm512_and_si512(both, low);
          second = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        }
        SPECDEC_UNROLL
        for (int v = 0; v < kVectors; v++) {
          __m512i whole = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first, part(0, v));
          whole = _mm512_slli_epi32(_mm512_dpbusd_epi32(whole, second, part(1, v)), 8);
          whole = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(whole, first, part(2, v)), second, part(3, v));
          if (kType == WeightType::kQ41) {
            sum[k][v] = fma(half_at(block + 2), _mm512_castsi512_ps(part(4, v)), sum[k][v]);
          } else {
            whole = _mm512_add_epi32(whole, part(4, v));
          }
          sum[k][v] = fma(scale, _mm512_cvtepi32_ps(whole), sum[k][v]);
        }
      }
    }
    SPECDEC_UNROLL
    for (int v = 0; v < kVectors; v++) {
      const Vec scale = load(reinterpret_cast<const float*>(rows + v * kVectorBytes));
      SPECDEC_UNROLL
      for (int k = 0; k < kSome; k++, kept += kWidth) {
        store(kept, begin ? sum[k][v] * scale : fma(sum[k][v], scale, load(kept)));
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

const ProductForm kIntegerForms[4] = {form_of<Int8Form>(), form_of<BlocksForm<WeightType::kQ80>>(),
                                      form_of<BlocksForm<WeightType::kQ40>>(), form_of<BlocksForm<WeightType::kQ41>>()};

}  // namespace specdec::cpu::avx512_vnni

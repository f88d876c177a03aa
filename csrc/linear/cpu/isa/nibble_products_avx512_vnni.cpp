// Blocks of four bits (q4_0, q4_1) times rows in exact integers of 16 bits (linear/cpu/integer_rows.h), by AVX-512's dot
// products of bytes.
//
// A vector holds a sum for each of sixteen rows of the weights: so a block's scale is multiplied with sixteen sums at
// once, and no sum is ever taken across a vector. Blocks of 32 rows of the weights are loaded as they lie, turned into
// columns of four neighbouring bytes, split into halves, and stay in registers while every row of x is multiplied with
// them: its bytes are broadcast, four at a time. So a block is unpacked once, whatever the number of rows, and from some
// eight rows on the dot products alone take the time: one for each 32 elements of a row and 16 weights.
//
// Sums of high and of low bytes are taken apart, and added as 256 * high + low; 32 products of 4 and 16 bits do not leave
// 32 bits. They become float32, times the block's scale; a piece of blocks is summed in order, multiplied with the scale
// of the row's piece, and added to the pieces before. Nothing of it depends on how many rows there are. Memory read: the
// weights once. Their rows are gone through side by side, which no processor foresees, so the next 32 are fetched
// meanwhile, in the order in which they lie.
#define SPECDEC_ISA avx512_vnni
#include "linear/cpu/integer_rows.h"
#include "linear/cpu/product_types.h"

namespace specdec::cpu::avx512_vnni {

constexpr int kLanes = 16;      // rows of the weights in a vector
constexpr int kVectors = 2;     // so many vectors of them at once
constexpr int kRowsAtOnce = 2;  // of x
constexpr int kBlock = kBlockElements;
constexpr int kPieceBlocks = 16;       // at most
constexpr int kRowBytes = 2 * kBlock;  // of a row's block: high bytes, low bytes
constexpr int kLine = 64;              // bytes
static_assert(kWeightTile % (kLanes * kVectors) == 0 && kFloatRowStep % kBlock == 0, "");

// How the dim is cut: into blocks, and these into pieces of as many blocks each, but for the last.
struct BlockPieces {
  int blocks, count, each;
  explicit SPECDEC_INLINE BlockPieces(int dim) : blocks(max_of(1, (dim + kBlock - 1) / kBlock)) {
    count = (blocks + kPieceBlocks - 1) / kPieceBlocks;
    each = (blocks + count - 1) / count;
  }
  SPECDEC_INLINE int begin(int piece) const { return min_of(piece * each, blocks); }
};

// Where packed rows have what: each block's bytes of every row; then a word of every row for each block; then scales of
// every row for each piece.
struct Packed {
  int64_t rows, words, scales, end;
  SPECDEC_INLINE Packed(const BlockPieces& pieces, int64_t rows) : rows(rows) {
    words = pieces.blocks * rows * kRowBytes;
    scales = words + pieces.blocks * rows * 4;
    end = scales + pieces.count * rows * 4;
  }
  SPECDEC_INLINE int64_t bytes_of(int block) const { return block * rows * kRowBytes; }
  SPECDEC_INLINE int64_t words_of(int block) const { return words + block * rows * 4; }
  SPECDEC_INLINE int64_t scales_of(int piece) const { return scales + piece * rows * 4; }
};

template <class Word>
static SPECDEC_INLINE void put_word(char* to, Word word) {
  static_assert(sizeof(Word) == 4, "");
  __builtin_memcpy(to, &word, 4);
}
static SPECDEC_INLINE __m512i broadcast_word(const char* at) {
  int32_t word;
  __builtin_memcpy(&word, at, 4);
  return _mm512_set1_epi32(word);
}
static SPECDEC_INLINE Vec broadcast_number(const char* at) { return _mm512_castsi512_ps(broadcast_word(at)); }

// 32 bytes of each of sixteen rows of the weights, load_row(row), as columns: vector j has word j of every row.
template <class LoadRow>
static SPECDEC_INLINE void load_columns(const LoadRow& load_row, __m512i (&column)[8]) {
  __m512i two_rows[8], pairs[8], fours[8];
  SPECDEC_UNROLL
  for (int i = 0; i < 8; i++) {
    const int row = i / 4 * 8 + i % 4;
    two_rows[i] = _mm512_inserti64x4(_mm512_castsi256_si512(load_row(row)), load_row(row + 4), 1);
  }
  SPECDEC_UNROLL
  for (int i = 0; i < 4; i++) {  // words 0, 1 (4, 5) of two rows; and 2, 3 (6, 7)
    pairs[i] = _mm512_unpacklo_epi32(two_rows[2 * i], two_rows[2 * i + 1]);
    pairs[4 + i] = _mm512_unpackhi_epi32(two_rows[2 * i], two_rows[2 * i + 1]);
  }
  SPECDEC_UNROLL
  for (int i = 0; i < 4; i++) {  // word 0 (4), 1 (5), 2 (6), 3 (7) of four rows; rows 0 to 7, then 8 to 15
    const int from = i / 2 * 4 + i % 2 * 2, to = i / 2 * 4 + i % 2;
    fours[to] = _mm512_unpacklo_epi64(pairs[from], pairs[from + 1]);
    fours[to + 2] = _mm512_unpackhi_epi64(pairs[from], pairs[from + 1]);
  }
  SPECDEC_UNROLL
  for (int i = 0; i < 4; i++) {
    column[i] = _mm512_shuffle_i32x4(fours[2 * i], fours[2 * i + 1], 0x88);
    column[4 + i] = _mm512_shuffle_i32x4(fours[2 * i], fours[2 * i + 1], 0xdd);
  }
}

// The same of some of the bytes behind rows[k] + offset, by their bits in `bytes`: others are zeros, and are not touched.
static SPECDEC_INLINE void load_columns(const char* const* rows, int64_t offset, __mmask32 bytes,
                                        __m512i (&column)[8]) {
  load_columns([&](int k) __attribute__((always_inline)) { return _mm256_maskz_loadu_epi8(bytes, rows[k] + offset); },
               column);
}

static SPECDEC_INLINE Vec low_float16(__m512i v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }
static SPECDEC_INLINE Vec high_float16(__m512i v) { return low_float16(_mm512_srli_epi32(v, 16)); }

static SPECDEC_INLINE void split(const __m512i* halves, __m512i (&bytes)[8]) {
  const __m512i low = _mm512_set1_epi8(15);
  SPECDEC_UNROLL
  for (int i = 0; i < 4; i++) {
    bytes[i] = _mm512_and_si512(halves[i], low);
    bytes[4 + i] = _mm512_and_si512(_mm512_srli_epi16(halves[i], 4), low);
  }
}

// A block of sixteen rows of the weights: columns of unsigned bytes; and what they are multiplied with, and the minimum.
struct Block {
  __m512i bytes[8];
  Vec scale, least;
};

template <WeightType kType>
static SPECDEC_INLINE void load_block(const char* const* rows, int64_t offset, Block& block) {
  __m512i column[8];
  if (kType == WeightType::kQ40) {  // two bytes before it, so that the halves are whole words
    load_columns(rows, offset - 2, 0xffffc, column);
    block.scale = high_float16(column[0]);
  } else {
    load_columns(rows, offset, 0xfffff, column);
    block.scale = low_float16(column[0]);
    block.least = high_float16(column[0]);
  }
  split(column + 1, block.bytes);
}

// What comes next in memory, brought into the second-level cache some lines at a time.
struct Fetch {
  const char *next, *end;
  template <int kLines>
  SPECDEC_INLINE void some() {
    if (next >= end) return;
    SPECDEC_UNROLL
    for (int i = 0; i < kLines; i++) __builtin_prefetch(next + i * kLine, 0, 2);
    next += kLines * kLine;
  }
};

template <WeightType kType>
struct NibblesForm {
  static constexpr int kAtOnce = kVectors * kLanes;  // rows of the weights
  static constexpr int kBytes = int(block_bytes(kType));

  static size_t packed_bytes(int dim, int rows) { return size_t(Packed(BlockPieces(dim), rows).end); }

  static void pack(const float* y, int dim, char* packed, int row, int rows) {
    const BlockPieces pieces(dim);
    const Packed place(pieces, rows);
    for (int piece = 0; piece < pieces.count; piece++) {
      const int first = pieces.begin(piece), end = pieces.begin(piece + 1);
      const Rounding rounding = rounding_of(y + first * kBlock, (end - first) * kBlock);
      put_word(packed + place.scales_of(piece) + row * 4, rounding.scale);
      for (int block = first; block < end; block++) {
        const Bytes low(rounding, y + block * kBlock), high(rounding, y + block * kBlock + kBlock / 2);
        char* const to = packed + place.bytes_of(block) + row * kRowBytes;
        put(to, low.high);
        put(to + 16, high.high);
        put(to + 32, low.low);
        put(to + 48, high.low);
        const int32_t sum = _mm512_reduce_add_epi32(_mm512_add_epi32(low.whole, high.whole));
        char* const word = packed + place.words_of(block) + row * 4;
        if (kType == WeightType::kQ40) put_word(word, -8 * sum);  // halves are 8 too much
        if (kType == WeightType::kQ41) put_word(word, float(sum));
      }
    }
  }

  // Adds the products of a block with kRows rows of x, from `bytes` on, to `sums`. `words`: what the rows have for it.
  template <int kSome, int kRows>
  static SPECDEC_INLINE void multiply_rows(const Block (&block)[kSome], const char* bytes, const char* words,
                                           float* sums) {
    __m512i high[kRows][kSome], low[kRows][kSome];
    SPECDEC_UNROLL
    for (int row = 0; row < kRows; row++) {
      SPECDEC_UNROLL
      for (int v = 0; v < kSome; v++) {
        high[row][v] = _mm512_setzero_si512();
        low[row][v] = kType == WeightType::kQ40 ? broadcast_word(words + 4 * row) : _mm512_setzero_si512();
      }
    }
    SPECDEC_UNROLL
    for (int i = 0; i < 8; i++) {
      SPECDEC_UNROLL
      for (int row = 0; row < kRows; row++) {
        const char* const at = bytes + row * kRowBytes + 4 * i;
        const __m512i of_high = broadcast_word(at), of_low = broadcast_word(at + kBlock);
        SPECDEC_UNROLL
        for (int v = 0; v < kSome; v++) {
          high[row][v] = _mm512_dpbusd_epi32(high[row][v], block[v].bytes[i], of_high);
          low[row][v] = _mm512_dpbusd_epi32(low[row][v], block[v].bytes[i], of_low);
        }
      }
    }
    SPECDEC_UNROLL
    for (int row = 0; row < kRows; row++) {
      SPECDEC_UNROLL
      for (int v = 0; v < kSome; v++) {
        const __m512i whole = _mm512_add_epi32(low[row][v], _mm512_slli_epi32(high[row][v], 8));
        float* const to = sums + (row * kSome + v) * kLanes;
        Vec sum = load(to);
        if (kType == WeightType::kQ41) sum = fma(block[v].least, broadcast_number(words + 4 * row), sum);
        store(to, fma(block[v].scale, _mm512_cvtepi32_ps(whole), sum));
      }
    }
  }

  // kSome vectors of rows of the weights with all rows of x.
  // `next`: the rows of the weights that come next.
  template <int kSome>
  static void multiply_vectors(const char* const* weights, int dim, const char* packed, int rows, Fetch& fetch,
                               float* outputs) {
    const BlockPieces pieces(dim);
    const Packed place(pieces, rows);
    alignas(64) float sums[kRowBlock * kSome * kLanes];
    for (int piece = 0; piece < pieces.count; piece++) {
      for (int i = 0; i < rows * kSome; i++) store(sums + i * kLanes, splat(0.0f));
      for (int i = pieces.begin(piece); i < pieces.begin(piece + 1); i++) {
        Block block[kSome];
        SPECDEC_UNROLL
        for (int v = 0; v < kSome; v++) load_block<kType>(weights + v * kLanes, int64_t(i) * kBytes, block[v]);
        fetch.template some<(kSome * kLanes * kBytes + kLine - 1) / kLine>();
        const char* const bytes = packed + place.bytes_of(i);
        const char* const words = packed + place.words_of(i);
        int row = 0;
        for (; row + kRowsAtOnce <= rows; row += kRowsAtOnce) {
          multiply_rows<kSome, kRowsAtOnce>(block, bytes + row * kRowBytes, words + row * 4,
                                            sums + row * kSome * kLanes);
        }
        for (; row < rows; row++) {
          multiply_rows<kSome, 1>(block, bytes + row * kRowBytes, words + row * 4, sums + row * kSome * kLanes);
        }
      }
      for (int row = 0; row < rows; row++) {
        const Vec scale = broadcast_number(packed + place.scales_of(piece) + row * 4);
        SPECDEC_UNROLL
        for (int v = 0; v < kSome; v++) {
          const float* from = sums + (row * kSome + v) * kLanes;
          const Vec sum = load(from);
          float* const to = outputs + row * kWeightTile + v * kLanes;
          store(to, piece == 0 ? sum * scale : fma(sum, scale, load(to)));
        }
      }
    }
  }

  static void multiply(const WeightTile& tile, const char* packed, int rows, float* outputs) {
    const int64_t at_once = kAtOnce * weight_row_bytes(kType, tile.dim);
    if (!tile.fetched) {  // all at once, or the first rows would come a line of each at a time
      for (int64_t i = 0; i < at_once; i += kLine) __builtin_prefetch(tile.row[0] + i, 0, 2);
    }
    for (int first = 0; first < tile.count; first += kAtOnce) {
      const char* weights[kAtOnce];
      for (int k = 0; k < kAtOnce; k++) weights[k] = tile.row[min_of(first + k, tile.count - 1)];
      const char* const next = first + kAtOnce < tile.count ? tile.row[first + kAtOnce] : tile.next;
      Fetch fetch = {next, next ? next + at_once : nullptr};
      if (tile.count - first > kLanes) {
        multiply_vectors<kVectors>(weights, tile.dim, packed, rows, fetch, outputs + first);
      } else {
        multiply_vectors<1>(weights, tile.dim, packed, rows, fetch, outputs + first);
      }
    }
  }

  static constexpr ProductForm form() { return {packed_bytes, pack, multiply, true}; }
};

const ProductForm kQ40Form = NibblesForm<WeightType::kQ40>::form();
const ProductForm kQ41Form = NibblesForm<WeightType::kQ41>::form();

}  // namespace specdec::cpu::avx512_vnni

// Products of a tile of the weights with packed rows, in the one order of sums that all numbers of rows share.
//
// A vector holds four sums of a dot product for each of a few rows: with 16 lanes those of four rows. 16 bytes of a row
// of the weights (four dims of float32, eight of bfloat16) are broadcast to all of them as they lie in memory, and the
// rows are packed to match. So a row is always summed alike, in four sums of every fourth dim or group of dims, whatever
// else lies in its vector, and one row costs what four do, which a processor that waits for memory has time for. A
// multiply-add in registers needs few loads: eight rows of the weights times three vectors are 24 of them for 11 loads.
//
// The dim is cut into pieces, the same for every number of rows. Sums of a piece begin at zero. At its end four vectors
// of them are reduced at once to four outputs of every row, which are added to those of the pieces before: that keeps
// sums short, and what is kept small. Where the packed rows fit in the second-level cache, a few rows of the weights are
// multiplied to their end; else a piece of 32 packed rows meets all of the tile's rows before the next piece. Pieces of
// the weights come from memory, a few rows side by side, each a stream, and those that are next are fetched meanwhile
// into the second-level cache.
#pragma once

#include "common/cpu/simd.h"
#include "linear/cpu/product_types.h"

namespace specdec::cpu::SPECDEC_ISA {

constexpr int kLaneRows = kWidth / 4;                 // rows in a vector
constexpr int kVectorBytes = 4 * kWidth;              // of packed rows
constexpr int kLine = 64;                             // bytes
constexpr int kChunk = 16;                            // bytes of a row of the weights that are broadcast
constexpr int kSlots = kWidth == 16 ? 8 : 4;          // rows of the weights, likewise: their sums fit the registers
constexpr int kStreams = 4;                           // with few rows: so many places of memory are read at once
constexpr int kStreamVectors = kWidth == 16 ? 4 : 3;  // of rows, then
constexpr int kStreamAhead = 2048;                    // bytes by which they are fetched into the first-level cache
constexpr int kNearRows = 32;                         // rows of which a piece stays in the first-level cache
constexpr int kNearVectors = kNearRows / kLaneRows;
constexpr int64_t kSecondLevel = 256 * 1024;  // bytes of packed rows that stay in that cache beside the weights
static_assert(kWeightTile % kSlots == 0 && kRowBlock % kNearRows == 0, "");

// How the dim is cut: into equal pieces of at most kPieceDims, whole lines of the weights, but for the last.
template <class Form>
struct Pieces {
  int dim, count, each;
  explicit SPECDEC_INLINE Pieces(int dim) : dim(dim) {
    count = max_of(1, (dim + Form::kPieceDims - 1) / Form::kPieceDims);
    each = round_up((dim + count - 1) / count, Form::kLineDims);
  }
  SPECDEC_INLINE int begin(int piece) const { return piece * each; }
  SPECDEC_INLINE int dims(int piece) const { return min_of(each, dim - piece * each); }
};

// Vectors of a near block are multiplied in groups of nearly equal size, which lie one after the other in each piece.
// Few rows make larger ones, because fewer rows of the weights are multiplied with them.
template <class Form>
struct Groups {
  int vectors, count;
  SPECDEC_INLINE Groups(int rows, bool streamed) : vectors((rows + kLaneRows - 1) / kLaneRows) {
    const int most = streamed ? kStreamVectors : Form::kMaxVectors;
    count = (vectors + most - 1) / most;
  }
  SPECDEC_INLINE int first(int group) const { return group * (vectors / count) + min_of(group, vectors % count); }
  SPECDEC_INLINE int size(int group) const { return vectors / count + (group < vectors % count); }
};

// Whether a form multiplies a single packed row by its own chunks alone, without the places of other rows beside them: a
// long row then stays in the first-level cache. Forms say so by a kOneRowAlone.
template <class Form, class = void>
struct OneRowAlone {
  static constexpr bool kYes = false;
};
template <class Form>
struct OneRowAlone<Form, decltype(void(Form::kOneRowAlone))> {
  static constexpr bool kYes = Form::kOneRowAlone;
};

// Bytes of a chunk of packed rows: a vector's.
template <class Form>
static SPECDEC_INLINE int step_bytes(int rows) {
  return OneRowAlone<Form>::kYes && rows == 1 ? kChunk : kVectorBytes;
}

// Where a row's part of the packed rows is. Vectors of a group alternate: one follows `apart` bytes after the other.
template <class Form>
struct RowPlace {
  int64_t block;     // bytes to the near block
  int vectors;       // of the block
  int first, apart;  // vector of the group, and bytes
  int step;          // bytes of a vector
  int inside;        // bytes: vector in the group, and row in the vector
  SPECDEC_INLINE RowPlace(int dim, int row, int rows) {
    const int near = row / kNearRows * kNearRows, vector = (row - near) / kLaneRows;
    const Groups<Form> groups(min_of(kNearRows, rows - near), rows <= kStreamedRows);
    block = int64_t(near / kLaneRows) * Form::row_vectors(dim) * kVectorBytes;
    vectors = groups.vectors;
    int group = 0;
    while (group + 1 < groups.count && groups.first(group + 1) <= vector) group++;
    first = groups.first(group);
    step = step_bytes<Form>(rows);
    apart = groups.size(group) * step;
    inside = (vector - first) * kVectorBytes + row % kLaneRows * kChunk;
  }
  // The row's first bytes of a piece.
  SPECDEC_INLINE int64_t of(const Pieces<Form>& pieces, int piece) const {
    const int64_t before = int64_t(piece) * Form::piece_vectors(pieces.each) * vectors;
    return block + (before + int64_t(Form::piece_vectors(pieces.dims(piece))) * first) * step + inside;
  }
};

template <class Form>
static SPECDEC_INLINE size_t bytes_of_rows(int dim, int rows) {
  const int64_t vectors = (rows + kLaneRows - 1) / kLaneRows;
  return size_t(vectors * Form::row_vectors(dim)) * step_bytes<Form>(rows);
}

// Some rows of the weights at a piece, and how many bytes further that lies which will be needed next, or 0.
template <int kSome>
struct WeightRows {
  static constexpr int kRows = kSome;
  const char* row[kSome];
  int64_t ahead;
  bool one_row;  // whether they are multiplied with a single packed row that lies alone
  SPECDEC_INLINE void fetch(int k, int64_t offset) const {
    if (kSome == kStreams) {
      __builtin_prefetch(row[k] + offset + ahead, 0, 3);
    } else {
      __builtin_prefetch(row[k] + offset + ahead, 0, 2);
    }
  }
};

// The four sums of each dot product become one: lane 4 * row + slot.
static SPECDEC_INLINE Vec sums_of_four(Vec a, Vec b, Vec c, Vec d) {
#if defined(__AVX512F__)
  const Vec low = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  const Vec high = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
  const __m512d x = _mm512_castps_pd(low), y = _mm512_castps_pd(high);
  return _mm512_castpd_ps(_mm512_unpacklo_pd(x, y)) + _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
#elif defined(__AVX2__)
  const Vec low = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b);
  const Vec high = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
  const __m256d x = _mm256_castps_pd(low), y = _mm256_castps_pd(high);
  return _mm256_castpd_ps(_mm256_unpacklo_pd(x, y)) + _mm256_castpd_ps(_mm256_unpackhi_pd(x, y));
#else
  const Vec all[4] = {a, b, c, d};
  Vec sums;
  for (int row = 0; row < kLaneRows; row++)
    for (int slot = 0; slot < 4; slot++) {
      const float* v = reinterpret_cast<const float*>(&all[slot]) + 4 * row;
      sums[4 * row + slot] = (v[0] + v[2]) + (v[1] + v[3]);
    }
  return sums;
#endif
}

#if defined(__AVX2__)
// A single row: the lanes of a vector that other rows would have go to other rows of the weights. Four of them are read
// a whole vector at a time, and their chunks change places, which takes a third of the loads and half of the
// multiply-adds or fewer.
constexpr int kOneRowVectors = kStreams / kLaneRows;  // of sums: those of kLaneRows rows of the weights each
static_assert(kStreams == 4 && kStreams % kLaneRows == 0, "");

// of_chunk[i]: chunk i of each of the four.
static SPECDEC_INLINE void chunks_of(const Vec (&line)[kStreams], Vec (&of_chunk)[kLaneRows][kOneRowVectors]) {
#if defined(__AVX512F__)
  const Vec low[2] = {_mm512_shuffle_f32x4(line[0], line[1], 0x44), _mm512_shuffle_f32x4(line[2], line[3], 0x44)};
  const Vec high[2] = {_mm512_shuffle_f32x4(line[0], line[1], 0xee), _mm512_shuffle_f32x4(line[2], line[3], 0xee)};
  of_chunk[0][0] = _mm512_shuffle_f32x4(low[0], low[1], 0x88);
  of_chunk[1][0] = _mm512_shuffle_f32x4(low[0], low[1], 0xdd);
  of_chunk[2][0] = _mm512_shuffle_f32x4(high[0], high[1], 0x88);
  of_chunk[3][0] = _mm512_shuffle_f32x4(high[0], high[1], 0xdd);
#else
  SPECDEC_UNROLL
  for (int v = 0; v < kOneRowVectors; v++) {
    of_chunk[0][v] = _mm256_permute2f128_ps(line[2 * v], line[2 * v + 1], 0x20);
    of_chunk[1][v] = _mm256_permute2f128_ps(line[2 * v], line[2 * v + 1], 0x31);
  }
#endif
}

// The four sums of each become one, in the order of sums_of_four and in row 0's lanes of its result.
static SPECDEC_INLINE Vec sums_of_one(const Vec (&sum)[kOneRowVectors]) {
#if defined(__AVX512F__)
  const Vec pairs = sum[0] + _mm512_permute_ps(sum[0], 0x4e);
  return _mm512_maskz_compress_ps(0x1111, pairs + _mm512_permute_ps(pairs, 0xb1));
#else
  __m128 two[kOneRowVectors];
  SPECDEC_UNROLL
  for (int v = 0; v < kOneRowVectors; v++) {
    const Vec pairs = sum[v] + _mm256_permute_ps(sum[v], 0x4e);
    const Vec sums = pairs + _mm256_permute_ps(pairs, 0xb1);
    two[v] = _mm_unpacklo_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
  }
  return _mm256_zextps128_ps256(_mm_movelh_ps(two[0], two[1]));
#endif
}
#endif

// Adds what sums_of_four made of a piece to what is kept of the pieces before, or begins with it.
static SPECDEC_INLINE void keep(float* kept, Vec sums, bool begin) { store(kept, begin ? sums : load(kept) + sums); }

// The order in which a tile is gone through, kSome of its rows at a time: with few packed rows from streams of
// neighbouring rows, else neighbours at once. They are read to their end, or, with many long packed rows, a piece of
// the whole tile comes first.
template <class Form, int kSome, bool kStreamed>
class TileProduct {
 public:
  TileProduct(const WeightTile& tile, const char* packed, int rows, float* outputs)
      : tile_(tile),
        packed_(packed),
        rows_(rows),
        outputs_(outputs),
        pieces_(tile.dim),
        places_((tile.count + kSome - 1) / kSome) {}

  void run() {
    const int vectors = (rows_ + kLaneRows - 1) / kLaneRows, sums = vectors * kKept;
    const bool to_end = kStreamed || int64_t(bytes_of_rows<Form>(tile_.dim, rows_)) <= kSecondLevel;
    const int step = to_end ? 1 : places_;
    for (int first = 0; first < places_; first += step) {
      const int end = min_of(first + step, places_);
      for (int piece = 0; piece < pieces_.count; piece++) {
        for (int row = 0; row < rows_; row += kNearRows) {
          for (int place = first; place < end; place++) {
            multiply(place, piece, row, kept_ + (place - first) * sums, row ? 0 : ahead(first, end, place, piece));
          }
        }
      }
      for (int place = first; place < end; place++) put(kept_ + (place - first) * sums, vectors, place);
    }
  }

 private:
  static constexpr int kMost = kStreamed ? kStreamVectors : Form::kMaxVectors;
  static constexpr int kKept = kSome / 4 * kWidth;  // sums that are kept for a vector of rows

  // The row of a stream, or of neighbours, at a place. In a short tile the last one may be repeated.
  SPECDEC_INLINE int row_at(int k, int place) const {
    return min_of(kStreamed ? k * places_ + place : place * kSome + k, tile_.count - 1);
  }

  // Bytes from rows at a piece to what is multiplied next.
  SPECDEC_INLINE int64_t ahead(int first, int end, int place, int piece) const {
    if (kStreamed) return kStreamAhead;
    const char* const row = tile_.row[row_at(0, place)];
    const auto distance = [&](int next, int next_piece) {
      return tile_.row[row_at(0, next)] - row + offset(next_piece) - offset(piece);
    };
    if (place + 1 < end) return distance(place + 1, piece);
    if (piece + 1 < pieces_.count) return distance(first, piece + 1);
    if (end < places_) return distance(end, 0);
    return tile_.next ? tile_.next - row - offset(piece) : 0;
  }

  SPECDEC_INLINE int64_t offset(int piece) const { return Form::weight_bytes(pieces_.begin(piece)); }

  SPECDEC_INLINE void multiply(int place, int piece, int row, float* kept, int64_t ahead) {
    WeightRows<kSome> weights;
    weights.ahead = ahead;
    weights.one_row = OneRowAlone<Form>::kYes && rows_ == 1;
    const int64_t begin = offset(piece);
    SPECDEC_UNROLL
    for (int k = 0; k < kSome; k++) weights.row[k] = tile_.row[row_at(k, place)] + begin;
    const int dims = pieces_.dims(piece);
    form_.stage(weights, dims);
    const Groups<Form> groups(min_of(kNearRows, rows_ - row), kStreamed);
    const char* rows = packed_ + int64_t(row / kLaneRows) * Form::row_vectors(tile_.dim) * kVectorBytes +
                       int64_t(piece) * Form::piece_vectors(pieces_.each) * groups.vectors * step_bytes<Form>(rows_);
    kept += row / kLaneRows * kKept;
    for (int group = 0; group < groups.count; group++) {
      const int size = groups.size(group);
      if (size == 1) Form::template multiply<kSome, 1>(weights, rows, dims, kept, piece == 0);
      if (size == 2) Form::template multiply<kSome, 2>(weights, rows, dims, kept, piece == 0);
      if constexpr (kMost > 2) {
        if (size == 3) Form::template multiply<kSome, 3>(weights, rows, dims, kept, piece == 0);
      }
      if constexpr (kMost > 3) {
        if (size == 4) Form::template multiply<kSome, 4>(weights, rows, dims, kept, piece == 0);
      }
      rows += int64_t(size) * Form::piece_vectors(dims) * kVectorBytes;
      kept += size * kKept;
      weights.ahead = 0;
    }
  }

  SPECDEC_INLINE void put(const float* kept, int vectors, int place) {
    for (int v = 0; v < vectors; v++) {
      SPECDEC_UNROLL
      for (int k = 0; k < kSome; k += 4) {
        const int rows = min_of(kLaneRows, rows_ - v * kLaneRows);
        float* to = outputs_ + v * kLaneRows * kWeightTile + (kStreamed ? k * places_ + place : place * kSome + k);
        for (int n = 0; n < rows; n++, to += kWeightTile) {
          if (kStreamed) {
            SPECDEC_UNROLL
            for (int i = 0; i < 4; i++) to[i * places_] = kept[4 * n + i];
          } else {
            __builtin_memcpy(to, kept + 4 * n, 4 * sizeof(float));
          }
        }
        kept += kWidth;
      }
    }
  }

  const WeightTile& tile_;
  const char* const packed_;
  const int rows_;
  float* const outputs_;
  const Pieces<Form> pieces_;
  const int places_;
  Form form_;
  alignas(64) float kept_[kStreamed ? kSome * kStreamedRows : kWeightTile * kRowBlock];
};

template <class Form>
static size_t packed_bytes(int dim, int rows) {
  return bytes_of_rows<Form>(dim, rows);
}

template <class Form>
static void pack(const float* y, int dim, char* packed, int row, int rows) {
  const Pieces<Form> pieces(dim);
  Form::pack(y, pieces, RowPlace<Form>(dim, row, rows), packed);
  if (row + 1 < rows || rows % kLaneRows == 0 || step_bytes<Form>(rows) == kChunk) return;
  alignas(64) static const float zeros[kFloatRowStep] = {};
  for (int beside = rows; beside % kLaneRows != 0; beside++) {
    const RowPlace<Form> place(dim, beside, beside + 1);  // of the same groups
    for (int piece = 0; piece < pieces.count; piece++) {
      char* to = packed + place.of(pieces, piece);
      for (int i = 0; i < Form::piece_vectors(pieces.dims(piece)); i++, to += place.apart) {
        __builtin_memcpy(to, zeros, kChunk);
      }
    }
  }
}

template <class Form>
static void multiply(const WeightTile& tile, const char* packed, int rows, float* outputs) {
  // One vector of rows is packed alike for both orders. A row alone has no other.
  const bool near = tile.near && rows <= kLaneRows && rows > 1;
  if (rows <= kStreamedRows && !near) {
    TileProduct<Form, kStreams, true>(tile, packed, rows, outputs).run();
  } else {
    TileProduct<Form, kSlots, false>(tile, packed, rows, outputs).run();
  }
}

template <class Form>
static constexpr ProductForm form_of() {
  return {packed_bytes<Form>, pack<Form>, multiply<Form>};
}

}  // namespace specdec::cpu::SPECDEC_ISA

// Tiles of an LM head on their way through shared memory, and their products with hidden rows.
//
// A tile is 128 rows of the head; it comes in pieces of 128 bytes of each row, together with the same dims of the
// block's hidden rows, by asynchronous copies of 16 bytes, kStages deep. A row's piece is eight such chunks, and chunk
// c of row r lies at place c ^ (r % 8), so that the eight rows that an ldmatrix reads lie in different banks.
//
// A warp has 16 rows of the head and all hidden rows. 16-bit heads are the first operand of matrix instructions, which
// takes 16 rows, hidden rows the second one, which takes 8: few hidden rows waste little. Int8 heads become 16-bit
// floats in registers. ldmatrix moves pairs of bytes as if they were 16-bit numbers, so a lane gets four neighbours
// where it would get two; that is another order of the 16 dims of an instruction, which the hidden rows follow. float32
// heads are multiplied as float32.
//
// A logit is the sum of its dims in their order, whatever the number of hidden rows, so a row's logits don't depend on
// its neighbours.
#pragma once

#include <type_traits>

#include "specdec/device.cuh"
#include "specdec/exit_params.h"

namespace specdec {

// Element: of the head; int8_t too. T: of hidden rows in shared memory. kRows: hidden rows of a block. kParts: numbers
// of type T whose sum stands for a hidden one.
template <class Element_, class T_, int kRows_, int kParts_>
struct HeadShape {
  using Element = Element_;
  using T = T_;
  static constexpr int kRows = kRows_;
  static constexpr int kParts = kParts_;
  static constexpr bool kIsInt8 = sizeof(Element) == 1;
  static constexpr bool kIsFloat32 = sizeof(Element) == 4;
  static constexpr int kVocab = 128;  // rows of a tile
  static constexpr int kThreads = 256;
  static constexpr int kPieceBytes = 128;
  static constexpr int kDims = kPieceBytes / int(sizeof(Element));      // of a piece
  static constexpr int kPanels = kDims * int(sizeof(T)) / kPieceBytes;  // 128 bytes of each hidden row
  static constexpr int kPanelBytes = kRows * kPieceBytes;
  static constexpr int kHeadBytes = kVocab * kPieceBytes;
  static constexpr int kStageBytes = kHeadBytes + kParts * kPanels * kPanelBytes;
  static constexpr int kStages = 4 * kStageBytes <= 80 * 1024 ? 4 : 3;
};

// A lane's share of its warp's sums: kRows / 8 groups of 8 hidden rows. Where element e of each lies:
template <class Shape>
__device__ __forceinline__ int sum_entry(int e, int lane) {
  return Shape::kIsFloat32 ? lane / 8 + 4 * e : lane / 4 + e / 2 * 8;
}
template <class Shape>
__device__ __forceinline__ int sum_row(int e, int lane) {
  return Shape::kIsFloat32 ? lane % 8 : lane % 4 * 2 + e % 2;
}

__device__ __forceinline__ int chunk_place(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// Two 16-dim steps of 16-bit products: `pair` of them, of a part of the hidden rows.
template <class Shape>
__device__ __forceinline__ void multiply_pair(float (&sums)[Shape::kRows / 8][4], const uint32_t (&a)[2][4],
                                              const unsigned char* rows, int pair, int lane) {
  using T = typename Shape::T;
  const unsigned char* panel = rows + pair / 2 * Shape::kPanelBytes;
  const int chunk = pair % 2 * 4;
  uint32_t b[4];
  if constexpr (Shape::kRows == 8) {
    ldmatrix_x4(b, panel + chunk_place(lane % 8, chunk + lane / 8));
    mma_m16n8k16<T>(sums[0], a[0], b[0], b[1]);
    mma_m16n8k16<T>(sums[0], a[1], b[2], b[3]);
  } else {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int j = 0; j < Shape::kRows / 16; ++j) {
        ldmatrix_x4(b, panel + chunk_place(j * 16 + lane % 8 + lane / 16 * 8, chunk + step * 2 + lane / 8 % 2));
        mma_m16n8k16<T>(sums[2 * j], a[step], b[0], b[1]);
        mma_m16n8k16<T>(sums[2 * j + 1], a[step], b[2], b[3]);
      }
    }
  }
}

// sums += a piece of the warp's 16 rows of the head, times the same dims of the hidden rows.
template <class Shape>
__device__ __forceinline__ void multiply_piece(float (&sums)[Shape::kRows / 8][4], const unsigned char* stage, int warp,
                                               int lane) {
  const unsigned char* rows = stage + Shape::kHeadBytes;
  if constexpr (Shape::kIsFloat32) {
    float piece[Shape::kRows / 8][4] = {};  // summed by itself: long chains of sums round more
#pragma unroll 1
    for (int chunk = 0; chunk < 8; ++chunk) {
      Pack<float, 4> head[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int entry = warp * 16 + sum_entry<Shape>(e, lane);
        head[e] = *reinterpret_cast<const Pack<float, 4>*>(stage + chunk_place(entry, chunk));
      }
#pragma unroll
      for (int j = 0; j < Shape::kRows / 8; ++j) {
        const int row = j * 8 + sum_row<Shape>(0, lane);
        const auto y = *reinterpret_cast<const Pack<float, 4>*>(rows + chunk_place(row, chunk));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) piece[j][e] += head[e].element[i] * y.element[i];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < Shape::kRows / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[j][e] += piece[j][e];
    }
  } else {
#pragma unroll
    for (int pair = 0; pair < Shape::kDims / 32; ++pair) {
      const int entry = warp * 16 + lane % 16;
      uint32_t a[2][4];
      if constexpr (Shape::kIsInt8) {
        uint32_t bytes[4];
        ldmatrix_x4(bytes, stage + chunk_place(entry, pair * 2 + lane / 16));
#pragma unroll
        for (int i = 0; i < 4; ++i) widen_int8<typename Shape::T>(bytes[i], a[i / 2][i % 2], a[i / 2][i % 2 + 2]);
      } else {
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          ldmatrix_x4(a[step], stage + chunk_place(entry, pair * 4 + step * 2 + lane / 16));
        }
      }
#pragma unroll
      for (int part = 0; part < Shape::kParts; ++part) {
        multiply_pair<Shape>(sums, a, rows + part * Shape::kPanels * Shape::kPanelBytes, pair, lane);
      }
    }
  }
}

// Rows of the head that a launch multiplies: all, or those that `entries` names.
struct HeadRows {
  const void* head;        // [vocab, dim]
  const int32_t* entries;  // [count], or nullptr: the first `count`
  int32_t count, dim;
  bool aligned;

  __device__ __forceinline__ int32_t entry(int32_t place) const { return entries == nullptr ? place : entries[place]; }
};

// Starts the copies of a piece of a tile, or does them if they can't be asynchronous. What is not there becomes zeros.
template <class Shape>
__device__ __forceinline__ void load_head(unsigned char* stage, const HeadRows& rows, int32_t tile, int32_t first_dim) {
  using Element = typename Shape::Element;
  constexpr int kSize = int(sizeof(Element));
  const auto* head = static_cast<const unsigned char*>(rows.head);
  const int64_t row_bytes = int64_t(rows.dim) * kSize;
  const int chunk = int(threadIdx.x) % 8;
  const int64_t begin = int64_t(first_dim) * kSize + chunk * 16, left = row_bytes - begin;
  const int bytes = left >= 16 ? 16 : left > 0 ? int(left) : 0;
  constexpr int kRowsAtOnce = Shape::kThreads / 8;
  const auto from_row = [&](int row) -> const unsigned char* {  // nullptr: nothing is there
    const int32_t place = tile * Shape::kVocab + row;
    return place < rows.count && bytes > 0 ? head + rows.entry(place) * row_bytes + begin : nullptr;
  };
  if (rows.aligned) {
#pragma unroll
    for (int i = 0; i < Shape::kVocab / kRowsAtOnce; ++i) {
      const int row = int(threadIdx.x) / 8 + i * kRowsAtOnce;
      const unsigned char* from = from_row(row);
      cp_async_16(stage + chunk_place(row, chunk), from != nullptr ? from : head, from != nullptr ? bytes : 0);
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < Shape::kVocab / kRowsAtOnce; ++i) {
    const int row = int(threadIdx.x) / 8 + i * kRowsAtOnce;
    const unsigned char* from = from_row(row);
    for (int at = 0; at < 16; at += kSize) {
      Element element{};
      if (from != nullptr && at < bytes) element = *reinterpret_cast<const Element*>(from + at);
      *reinterpret_cast<Element*>(stage + chunk_place(row, chunk) + at) = element;
    }
  }
}

}  // namespace specdec

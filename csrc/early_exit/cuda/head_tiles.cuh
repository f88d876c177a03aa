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

#include "common/cuda/device.cuh"
#include "early_exit/cuda/exit_launch.h"

namespace specdec::cuda {

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
  static constexpr int kVocab = kExitVocabTile;
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

template <int kCount>
__device__ __forceinline__ void add_sums(float (*sums)[4], const float (&piece)[kCount][4]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[j][e] += piece[j][e];
  }
}

// sums += two 16-dim steps of 16-bit products with hidden rows. Each two steps are summed by themselves: a matrix
// instruction cuts off what falls below the last bit of its greatest number, and long chains of them would show it.
template <class Shape>
__device__ __forceinline__ void multiply_pair(float (&sums)[Shape::kRows / 8][4], const uint32_t (&a)[2][4],
                                              const unsigned char* rows, int pair, int lane) {
  using T = typename Shape::T;
  constexpr int kPartBytes = Shape::kPanels * Shape::kPanelBytes;
  const unsigned char* panel = rows + pair / 2 * Shape::kPanelBytes;
  const int chunk = pair % 2 * 4;
  uint32_t b[4];
  if constexpr (Shape::kRows == 8) {
    float piece[1][4] = {};
#pragma unroll
    for (int part = 0; part < Shape::kParts; ++part) {
      ldmatrix_x4(b, panel + part * kPartBytes + (chunk_place(lane % 8, lane / 8) ^ chunk << 4));
      mma_m16n8k16<T>(piece[0], a[0], b[0], b[1]);
      mma_m16n8k16<T>(piece[0], a[1], b[2], b[3]);
    }
    add_sums(sums, piece);
  } else {
    const int row = lane % 8 + lane / 16 * 8;
#pragma unroll
    for (int j = 0; j < Shape::kRows / 16; ++j) {
      float piece[2][4] = {};
#pragma unroll
      for (int part = 0; part < Shape::kParts; ++part) {
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          ldmatrix_x4(b,
                      panel + part * kPartBytes + (chunk_place(j * 16 + row, lane / 8 % 2) ^ (chunk + step * 2) << 4));
          mma_m16n8k16<T>(piece[0], a[step], b[0], b[1]);
          mma_m16n8k16<T>(piece[1], a[step], b[2], b[3]);
        }
      }
      add_sums(sums + 2 * j, piece);
    }
  }
}

// The products of float32 numbers.
template <class Shape>
__device__ __forceinline__ void multiply_float32(float (&sums)[Shape::kRows / 8][4], const unsigned char* head,
                                                 const unsigned char* rows, int warp, int lane) {
#pragma unroll 1
  for (int chunk = 0; chunk < 8; ++chunk) {
    Pack<float, 4> w[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int entry = warp * 16 + sum_entry<Shape>(e, lane);
      w[e] = *reinterpret_cast<const Pack<float, 4>*>(head + chunk_place(entry, chunk));
    }
#pragma unroll
    for (int j = 0; j < Shape::kRows / 8; ++j) {
      const int row = j * 8 + sum_row<Shape>(0, lane);
      const auto y = *reinterpret_cast<const Pack<float, 4>*>(rows + chunk_place(row, chunk));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[j][e] += w[e].element[i] * y.element[i];
      }
    }
  }
}

// sums += a piece of the warp's 16 rows of the head, times the same dims of the hidden rows: one of kTurns parts of it.
template <class Shape, int kTurns>
__device__ __forceinline__ void multiply_piece(int turn, float (&sums)[Shape::kRows / 8][4], const unsigned char* stage,
                                               int warp, int lane) {
  const unsigned char* rows = stage + Shape::kHeadBytes;
  if constexpr (Shape::kIsFloat32) {
    static_assert(kTurns == 1);
    float piece[Shape::kRows / 8][4] = {};
    multiply_float32<Shape>(piece, stage, rows, warp, lane);
    add_sums(sums, piece);
  } else {
    const int entry = warp * 16 + lane % 16;
    constexpr int kPairs = Shape::kDims / 32 / kTurns;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int pair = turn * kPairs + i;
      uint32_t a[2][4];
      if constexpr (Shape::kIsInt8) {
        uint32_t bytes[4];
        ldmatrix_x4(bytes, stage + (chunk_place(entry, lane / 16) ^ pair << 5));
#pragma unroll
        for (int k = 0; k < 4; ++k) widen_int8<typename Shape::T>(bytes[k], a[k / 2][k % 2], a[k / 2][k % 2 + 2]);
      } else {
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          ldmatrix_x4(a[step], stage + (chunk_place(entry, lane / 16) ^ (pair * 2 + step) << 5));
        }
      }
      multiply_pair<Shape>(sums, a, rows, pair, lane);
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
  const int32_t row_bytes = rows.dim * kSize;
  const int chunk = int(threadIdx.x) % 8;
  const int32_t begin = first_dim * kSize + chunk * 16, left = row_bytes - begin;
  const int bytes = left >= 16 ? 16 : left > 0 ? left : 0;
  constexpr int kRowsAtOnce = Shape::kThreads / 8;
  const auto from_row = [&](int row) -> const unsigned char* {  // nullptr: nothing is there
    const int32_t place = tile * Shape::kVocab + row;
    return place < rows.count && bytes > 0 ? head + int64_t(rows.entry(place)) * row_bytes + begin : nullptr;
  };
  if (rows.aligned) {
#pragma unroll(Shape::kRows < 64 ? 4 : 1)  // many hidden rows leave few registers
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

}  // namespace specdec::cuda

// What products of few rows share on a GPU, linear and kv_propagate: tiles of their rows, and sums of parts.
//
// A block has some rows of x and goes through their columns a tile at a time. A thread has a few pieces of 16 bytes of
// the next tile in registers while the one before is multiplied; on their way to shared memory they are normalised and
// rounded to their dtype, as an engine feeds its matrix product. The warps have parts of a tile's columns; what they
// have summed is summed at the end, one part after the other, so that a row's sum has one order.
//
// Shape has T, kThreads, kRows (of x, in a block), kPiece (elements of 16 bytes), kPieces (of a row of a tile),
// kRowPieces (of a thread), kRowPitch (elements from a row of a tile to the next), and for the sums kParts, kGroups (of
// four sums of a thread) and kOutPitch.
#pragma once

#include "common/cuda/device.cuh"
#include "common/types.h"

namespace specdec::cuda {

// The rows of x of a block.
struct BlockRows {
  const void* x;  // the first one
  int64_t stride_row;
  int32_t rows, dim;
  bool aligned;  // rows start and end at multiples of 16 bytes
};

// The weight of an RMSNorm, float32 or of x's dtype. nullptr: no norm.
struct NormWeight {
  const void* weight;
  DType dtype;
};

// Makes tiles of rows. Rows that don't start and end at multiples of 16 bytes are read when their tile is made.
template <class Shape>
struct RowTile {
  using T = typename Shape::T;
  using Piece = Pack<T, Shape::kPiece>;
  Piece x[Shape::kRowPieces];
  float norm[Shape::kPiece];
  int32_t begin;  // column of what was loaded

  __device__ __forceinline__ static int row_of(int i) {
    return (int(threadIdx.x) + i * Shape::kThreads) / Shape::kPieces;
  }
  // A thread's row may be none of the block's where there are less pieces than threads.
  __device__ __forceinline__ static bool is_row(int i) {
    return Shape::kRows * Shape::kPieces % Shape::kThreads == 0 || row_of(i) < Shape::kRows;
  }
  __device__ __forceinline__ static int column() { return int(threadIdx.x) % Shape::kPieces * Shape::kPiece; }

  __device__ __forceinline__ static const T* row(const BlockRows& rows, int32_t row) {
    return static_cast<const T*>(rows.x) + row * rows.stride_row;
  }

  // The tile that starts at this column.
  __device__ __forceinline__ void load(const BlockRows& rows, const NormWeight& of, int32_t first_column) {
    begin = first_column + column();
#pragma unroll
    for (int i = 0; i < Shape::kRowPieces; ++i) {
      x[i] = {};
      if (!rows.aligned || row_of(i) >= rows.rows || begin >= rows.dim) continue;
      x[i] = *reinterpret_cast<const Piece*>(row(rows, row_of(i)) + begin);
    }
#pragma unroll
    for (int e = 0; e < Shape::kPiece; ++e) {
      norm[e] = 1.0f;
      if (of.weight == nullptr || begin + e >= rows.dim) continue;
      norm[e] = of.dtype == DType::kFloat32 ? static_cast<const float*>(of.weight)[begin + e]
                                            : to_float(static_cast<const T*>(of.weight)[begin + e]);
    }
  }

  // What was loaded, to shared memory: 0 beyond the rows and beyond dim.
  __device__ __forceinline__ void store(T* tile, const float* inverse_norms, const BlockRows& rows) {
    if (rows.aligned) {
#pragma unroll
      for (int i = 0; i < Shape::kRowPieces; ++i) {
        if (!is_row(i)) continue;
        const float inverse_norm = inverse_norms[row_of(i)];
        Piece piece;
#pragma unroll
        for (int e = 0; e < Shape::kPiece; ++e) {
          piece.element[e] = from_float<T>(to_float(x[i].element[e]) * inverse_norm * norm[e]);
        }
        *reinterpret_cast<Piece*>(tile + row_of(i) * Shape::kRowPitch + column()) = piece;
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < Shape::kRowPieces; ++i) {
        if (!is_row(i)) continue;
        const T* from = row(rows, row_of(i)) + begin;
        const int32_t count = row_of(i) < rows.rows ? rows.dim - begin : 0;
        const float inverse_norm = inverse_norms[row_of(i)];
#pragma unroll
        for (int e = 0; e < Shape::kPiece; ++e) {
          const float value = e < count ? to_float(from[e]) : 0.0f;
          tile[row_of(i) * Shape::kRowPitch + column() + e] = from_float<T>(value * inverse_norm * norm[e]);
        }
      }
    }
  }
};

// inverse_norms[row] = 1 / root of the mean square of each row: a warp to a row. Without a norm it is 1.
template <class Shape>
__device__ __forceinline__ void find_inverse_norms(float* inverse_norms, const BlockRows& rows, bool has_norm,
                                                   float eps) {
  using Tile = RowTile<Shape>;
  const int lane = threadIdx.x % kWarpSize;
  for (int row = threadIdx.x / kWarpSize; row < Shape::kRows; row += Shape::kThreads / kWarpSize) {
    const bool normalise = has_norm && row < rows.rows;
    const typename Shape::T* from = Tile::row(rows, normalise ? row : 0);
    const int32_t end = normalise ? rows.dim : 0;
    float sum = 0.0f;
#pragma unroll 4
    for (int32_t begin = lane * Shape::kPiece; begin < end; begin += kWarpSize * Shape::kPiece) {
      if (rows.aligned) {
        const auto piece = *reinterpret_cast<const typename Tile::Piece*>(from + begin);
#pragma unroll
        for (int e = 0; e < Shape::kPiece; ++e) sum += to_float(piece.element[e]) * to_float(piece.element[e]);
      } else {
#pragma unroll 1
        for (int e = 0; e < min(Shape::kPiece, end - begin); ++e)
          sum += to_float(from[begin + e]) * to_float(from[begin + e]);
      }
    }
#pragma unroll
    for (int bit = kWarpSize / 2; bit > 0; bit /= 2) sum += warp_shuffle_xor(sum, bit);
    if (lane == 0) inverse_norms[row] = normalise ? 1.0f / sqrtf(sum / float(rows.dim) + eps) : 1.0f;
  }
}

// out[channel_of(e), row_of(j, e)] = the sums[j][e] of all parts, in their order. A part is two warps. All threads of
// the block come here; those that write nothing wait with them.
template <class Shape, class Sums>
__device__ __forceinline__ void sum_parts(float* out, const Sums& sums, bool writes) {
  const int own = int(threadIdx.x) / kWarpSize / 2;
#pragma unroll 1
  for (int part = 0; part < Shape::kParts; ++part) {
    if (part == own && writes) {
#pragma unroll
      for (int j = 0; j < Shape::kGroups; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& to = out[Sums::channel_of(e) * Shape::kOutPitch + Sums::row_of(j, e)];
          to = part == 0 ? sums.sum[j][e] : to + sums.sum[j][e];
        }
      }
    }
    block_sync();  // the next part adds to it
  }
}

}  // namespace specdec::cuda

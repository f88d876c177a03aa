// Products of few rows with a matrix of weights, as each instruction set offers them: plain types alone, for units that
// are compiled with other flags than the rest.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/types.h"
#include "linear/params.h"
#include "linear/weight_type.h"

namespace specdec::cpu {

constexpr int kWeightTile = 64;    // rows of the weights that are multiplied at once
constexpr int kRowBlock = 64;      // rows that are multiplied with a tile before the next ones
constexpr int kStreamedRows = 16;  // up to here memory is what all wait for, and weights are read row after row
constexpr int kFloatRowStep = 64;  // rows in float32 go on with zeros to a multiple of so many dims

// The rows of a call, as they are given. y = x, or x / sqrt(mean(x^2) + norm_eps) * norm_weight.
struct InputRows {
  const void* x;  // [rows, dim]
  DType dtype;
  int64_t stride;           // elements from one row to the next
  const void* norm_weight;  // [dim], or nullptr: no norm
  DType norm_dtype;
  float norm_eps;
  int dim;
};

struct WeightTile {
  const char* row[kWeightTile];  // where each row of the weights begins
  int count;                     // rows
  int dim;
  const char* next;      // the first row of the tile that comes next, to be fetched ahead, or nullptr
  bool near = false;     // weights that a cache is likely to hold: read neighbours at once, and not streams of memory
  bool fetched = false;  // whether this one is what came next

  // The rows from `first` to `end` of all, as many as a tile may have; next those behind them.
  static WeightTile of(WeightType type, const void* weights, int64_t first, int64_t end, int dim) {
    WeightTile tile;
    const int64_t bytes = weight_row_bytes(type, dim);
    tile.count = int(end - first < kWeightTile ? end - first : kWeightTile);
    tile.dim = dim;
    for (int i = 0; i < tile.count; i++) tile.row[i] = static_cast<const char*>(weights) + (first + i) * bytes;
    tile.next = first + tile.count < end ? tile.row[0] + tile.count * bytes : nullptr;
    return tile;
  }

  // Some rows, anywhere.
  static WeightTile of_entries(WeightType type, const void* weights, const int32_t* entries, int count, int dim) {
    WeightTile tile;
    tile.count = count;
    tile.dim = dim;
    tile.next = nullptr;
    for (int i = 0; i < count; i++) {
      tile.row[i] = static_cast<const char*>(weights) + entries[i] * weight_row_bytes(type, dim);
    }
    return tile;
  }
};

// How rows are packed and multiplied, with weights of one type on one instruction set.
struct ProductForm {
  // Bytes of `rows` packed rows, at most kRowBlock.
  size_t (*packed_bytes)(int dim, int rows);
  // Puts y [float_row(dim)] among `rows` packed rows. The last row must be packed as well: it clears what is beside it.
  void (*pack)(const float* y, int dim, char* packed, int row, int rows);
  // outputs [rows][kWeightTile] of packed rows, as far as the tile's count, whatever is behind.
  void (*multiply)(const WeightTile& tile, const char* packed, int rows, float* outputs);
  // Whether it is fastest with neighbouring rows of the weights, with few packed rows too.
  bool in_order = false;
};

// What each instruction set offers (linear/cpu/product_kernels.h).
struct ProductKernels {
  // A row in float32, with its norm and the zeros behind it: y [float_row(dim)].
  void (*normalise)(const InputRows& rows, int row, float* y);
  // Rounds y to bfloat16, where packed rows of pairs are.
  void (*round)(float* y, int dim);
  // Makes results of sums [rows][kWeightTile] and writes them: linear/cpu/finish.h.
  void (*finish)(const LinearParams& p, const float* sums, int first_row, int rows, int first_output, int outputs);
  ProductForm widened[7];  // of each WeightType: rows stay in float32
  ProductForm pairs;       // bfloat16 weights and rows, or nothing
};

namespace generic {
extern const ProductKernels kProductKernels;
}
namespace avx2 {
extern const ProductKernels kProductKernels;
}
namespace avx512 {
extern const ProductKernels kProductKernels;
}
namespace avx512_bf16 {
extern const ProductKernels kProductKernels;
}

// Int8 weights and blocks by integer products (linear/cpu/isa/*_avx512_vnni.cpp).
namespace avx512_vnni {
extern const ProductForm kInt8Form, kQ80Form, kQ40Form, kQ41Form;
double rounding_error(const float* y, int dim);  // the length of y - what `pack` of int8 makes of it
}  // namespace avx512_vnni

}  // namespace specdec::cpu

// Products of few rows with a matrix of weights, as each instruction set offers them: plain types alone, for units that
// are compiled with other flags than the rest.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/types.h"
#include "linear/weight_type.h"

namespace specdec::cpu {

constexpr int kWeightTile = 64;         // rows of the weights that are multiplied at once
constexpr int kRowBlock = 60;           // rows that are multiplied with a tile before the next ones
constexpr int kRowsTogether = 4;        // packed rows have room for a multiple of so many
constexpr int kFloatRowStep = 64;       // rows in float32 go on with zeros to a multiple of so many dims
constexpr int kMaxIntegerDim = 65'536;  // sums of int8 times uint8 fit into 32 bits

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
  const void* weights;  // of its first row
  int count;            // rows, at most kWeightTile
  int dim;
  const int32_t* entries;  // [count], which rows of the weights, or nullptr: the first ones
};

// What each instruction set offers (linear/cpu/product_kernels.h).
struct ProductKernels {
  // A row in float32, with its norm and the zeros behind it: y [float_row(dim)].
  void (*normalise)(const InputRows& rows, int row, float* y);
  // Bytes of a packed row.
  size_t (*packed_bytes)(HeadType type, int dim);
  // Puts y among `rows` packed rows. They may be multiplied together, or cut into pieces of kRowBlock. The rows of the
  // whole call decide their order there, and the order of the sums in multiply.
  void (*pack)(HeadType type, const float* y, int dim, char* packed, int row, int rows, int call_rows);
  // Rounds y to what a packed row holds.
  void (*round)(HeadType type, float* y, int dim);
  // outputs [rows][kWeightTile] of packed rows, as far as `count`.
  void (*multiply)(HeadType type, const WeightTile& tile, const char* packed, int rows, int call_rows, float* outputs);
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

// Int8 weights by integer products (linear/cpu/isa/int8_tile_avx512_vnni.cpp), in place of the functions of the same names above.
namespace avx512_vnni {
size_t packed_bytes(HeadType type, int dim);
void pack(HeadType type, const float* y, int dim, char* packed, int row, int rows, int call_rows);
void multiply(HeadType type, const WeightTile& tile, const char* packed, int rows, int call_rows, float* outputs);
double rounding_error(const float* y, int dim);  // the length of y - what `pack` makes of it
}  // namespace avx512_vnni

}  // namespace specdec::cpu

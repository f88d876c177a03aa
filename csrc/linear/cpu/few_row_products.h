// Products of few rows with a matrix of weights: what LM heads, kv_propagate and decision models share on a CPU.
//
// Rows become float32, with an RMSNorm if there is one, and then packed rows, which are multiplied with the weights. A
// caller goes through the weights a tile at a time, in any order and on any threads. An output is the sum of its
// products in an order that depends on the dim, the types and the number of rows of the call alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "linear/cpu/product_types.h"

namespace specdec::cpu {

// Elements of a row in float32, with the zeros behind it.
inline int64_t float_row(int dim) { return (int64_t(dim) + kFloatRowStep - 1) / kFloatRowStep * kFloatRowStep; }

// Those of the best instruction set. `may_round`: rows may be rounded to 16 bits before int8 weights, where that is
// faster.
ProductKernels product_kernels(HeadType type, int dim, bool may_round);

// The length of a row as it is multiplied, y, and that of y less what these kernels make of it.
struct RowLength {
  double whole, rounding;
};
RowLength row_length(const ProductKernels& kernels, const std::vector<float>& y, int dim);

struct AlignedBytes {
  explicit AlignedBytes(size_t bytes) : memory(bytes + 63) {}
  char* data() { return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t(63)); }
  std::vector<char> memory;
};

// Some of a call's rows in the form in which they are multiplied, which depends on how many the call has.
class PackedRows {
 public:
  PackedRows(const ProductKernels& kernels, HeadType type, int dim, int rows, int call_rows)
      : kernels_(kernels),
        type_(type),
        dim_(dim),
        rows_(rows),
        call_rows_(call_rows),
        row_bytes_(kernels.packed_bytes(type, dim)),
        packed_(row_bytes_ * ((rows + kRowsTogether - 1) / kRowsTogether * kRowsTogether)) {}

  void set(int row, const float* y) { kernels_.pack(type_, y, dim_, packed_.data(), row, rows_, call_rows_); }

  // Calls take(row, outputs [kWeightTile]) for each row with its products with a tile of the weights.
  template <class Take>
  void multiply(const WeightTile& tile, const Take& take) {
    alignas(64) float outputs[kRowBlock * kWeightTile];
    for (int first = 0; first < rows_; first += kRowBlock) {
      const int some = rows_ - first < kRowBlock ? rows_ - first : kRowBlock;
      kernels_.multiply(type_, tile, packed_.data() + first * row_bytes_, some, call_rows_, outputs);
      for (int n = 0; n < some; n++) take(first + n, outputs + n * kWeightTile);
    }
  }

 private:
  const ProductKernels kernels_;
  const HeadType type_;
  const int dim_, rows_, call_rows_;
  const size_t row_bytes_;
  AlignedBytes packed_;
};

}  // namespace specdec::cpu

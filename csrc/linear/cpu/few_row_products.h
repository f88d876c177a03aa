// Products of few rows with a matrix of weights: what linear, LM heads, kv_propagate and decision models share on a CPU.
//
// Rows become float32, with an RMSNorm if there is one, and then packed rows, which are multiplied with the weights. A
// caller goes through the weights a tile at a time, in any order and on any threads. An output is the sum of its
// products in an order that depends on the dim and the types alone, not on how many rows there are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "linear/cpu/product_types.h"

namespace specdec::cpu {

// Elements of a row in float32, with the zeros behind it.
inline int64_t float_row(int dim) { return (int64_t(dim) + kFloatRowStep - 1) / kFloatRowStep * kFloatRowStep; }

// Those of the best instruction set.
const ProductKernels& product_kernels();

// `may_round`: rows may be rounded to bfloat16 before bfloat16 weights, and to 16 bits before integers, where that is
// faster.
ProductForm product_form(WeightType type, bool may_round);

// That of an LM head or a layer: rows are rounded to bfloat16 for one of bfloat16, as PyTorch does.
inline ProductForm head_form(HeadType type, bool may_round) {
  return product_form(WeightType(type), may_round || type == HeadType::kBFloat16);
}

// Rounds y to bfloat16 if the form does so.
void round_row(const ProductForm& form, std::vector<float>& y);

// The length of a row as it is multiplied, y, and that of y less what this form makes of it.
struct RowLength {
  double whole, rounding;
};
RowLength row_length(const ProductForm& form, const std::vector<float>& y, int dim);

// Memory that begins with a cache line, and is not cleared.
class AlignedBytes {
 public:
  explicit AlignedBytes(size_t bytes) : memory_(new char[bytes + 63]) {}
  char* data() const {
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) & ~uintptr_t(63));
  }

 private:
  std::unique_ptr<char[]> memory_;
};

// Rows in the form in which they are multiplied. All must be set before the product.
class PackedRows {
 public:
  PackedRows(const ProductForm& form, int dim, int rows)
      : form_(form),
        dim_(dim),
        rows_(rows),
        block_bytes_((form.packed_bytes(dim, kRowBlock) + 63) / 64 * 64),
        packed_(rows / kRowBlock * block_bytes_ + form.packed_bytes(dim, rows % kRowBlock)) {}

  // Whether tiles should take their rows of the weights from streams (linear/cpu/row_lanes.h).
  bool streamed() const { return rows_ <= kStreamedRows && !form_.in_order; }

  void set(int row, const float* y) { form_.pack(y, dim_, block(row), row % kRowBlock, rows_of(row)); }

  // Calls take(first row, rows, sums [rows][kWeightTile]) for each block of rows with its products with a tile.
  template <class Take>
  void multiply_blocks(const WeightTile& tile, const Take& take) const {
    alignas(64) float sums[kRowBlock * kWeightTile];
    for (int first = 0; first < rows_; first += kRowBlock) {
      form_.multiply(tile, block(first), rows_of(first), sums);
      take(first, rows_of(first), sums);
    }
  }

  // Calls take(row, sums [kWeightTile]) for each row.
  template <class Take>
  void multiply(const WeightTile& tile, const Take& take) const {
    multiply_blocks(tile, [&](int first, int rows, float* sums) {
      for (int n = 0; n < rows; n++) take(first + n, sums + n * kWeightTile);
    });
  }

 private:
  char* block(int row) const { return packed_.data() + row / kRowBlock * block_bytes_; }
  int rows_of(int row) const {
    const int first = row / kRowBlock * kRowBlock;
    return rows_ - first < kRowBlock ? rows_ - first : kRowBlock;
  }

  const ProductForm form_;
  const int dim_, rows_;
  const size_t block_bytes_;
  AlignedBytes packed_;
};

}  // namespace specdec::cpu

// The products of few rows (linear/cpu/product_types.h) on one instruction set.
//
// Outputs are dot products (linear/cpu/dots.h); those of bfloat16 weights with many rows have a form of their own where
// the processor multiplies pairs (linear/cpu/quads.h).
#pragma once

#include "common/cpu/simd_int.h"
#include "linear/cpu/dots.h"
#include "linear/cpu/product_types.h"
#if defined(__AVX512BF16__)
#include "linear/cpu/quads.h"
#endif

namespace specdec::cpu::SPECDEC_ISA {

static void multiply(HeadType type, const WeightTile& tile, const char* packed, int rows, int call_rows,
                     float* outputs) {
  with_head(type, [&](auto multiplier) {
    using Multiplier = decltype(multiplier);
#if defined(__AVX512BF16__)
    if (takes_quads(type, tile.dim, call_rows)) {
      const int stride = packed_dim<BFloat16Pairs>(tile.dim);
      return multiply_quads(tile, reinterpret_cast<const uint16_t*>(packed), stride, rows, call_rows, outputs);
    }
#endif
    multiply_rows<Multiplier>(tile, packed, rows, call_rows, outputs);
  });
}

static void round(HeadType type, float* y, int dim) {
  with_head(type, [&](auto multiplier) { decltype(multiplier)::round(y, dim); });
}

static size_t packed_bytes(HeadType type, int dim) {
  return with_head(type, [&](auto multiplier) {
    using Multiplier = decltype(multiplier);
    return size_t(packed_dim<Multiplier>(dim)) * sizeof(typename Multiplier::Hidden);
  });
}

static void pack(HeadType type, const float* y, int dim, char* packed, int row, int rows, int call_rows) {
  with_head(type, [&](auto multiplier) {
    using Multiplier = decltype(multiplier);
#if defined(__AVX512BF16__)
    if (takes_quads(type, dim, call_rows)) {
      const int stride = packed_dim<BFloat16Pairs>(dim);
      return pack_quads(y, dim, stride, reinterpret_cast<uint16_t*>(packed), row, rows);
    }
#else
    (void)call_rows;
#endif
    constexpr int kStep = Multiplier::kStep;
    const int first = row / kTogether * kTogether, together = min_of(kTogether, rows - first);
    const int whole = packed_dim<Multiplier>(dim);
    auto* to = reinterpret_cast<typename Multiplier::Hidden*>(packed) + int64_t(first) * whole + (row - first) * kStep;
    static_assert(kFloatRowStep % kStep == 0, "");
    for (int d = 0; d < whole; d += kStep, to += together * kStep) Multiplier::pack(y + d, to);
  });
}

// The last elements of a row, fewer than a vector, and zeros.
template <class Storage>
struct Rest {
  typename Storage::Element padded[kWidth] = {};
  Rest(const typename Storage::Element* from, int count) { __builtin_memcpy(padded, from, count * sizeof(padded[0])); }
};

template <class Storage>
static void normalise_row(const InputRows& rows, int row, float* y) {
  const auto* x = static_cast<const typename Storage::Element*>(rows.x) + row * rows.stride;
  const int whole = rows.dim / kWidth * kWidth;
  Vec squares = splat(0.0f);
  const auto take = [&](const auto* from, int d) {
    const Vec v = Storage::load_vec(from);
    store(y + d, v);
    squares = fma(v, v, squares);
  };
  for (int d = 0; d < whole; d += kWidth) take(x + d, d);
  if (whole < rows.dim) take(Rest<Storage>(x + whole, rows.dim - whole).padded, whole);
  if (!rows.norm_weight) return;
  const Vec scale = splat(1.0f / __builtin_sqrtf(total(squares) / float(rows.dim) + rows.norm_eps));
  for (int d = 0; d < rows.dim; d += kWidth) store(y + d, load(y + d) * scale);
}

template <class Storage>
static void weigh_row(const InputRows& rows, float* y) {
  const auto* weight = static_cast<const typename Storage::Element*>(rows.norm_weight);
  const int whole = rows.dim / kWidth * kWidth;
  for (int d = 0; d < whole; d += kWidth) store(y + d, load(y + d) * Storage::load_vec(weight + d));
  if (whole == rows.dim) return;
  const Rest<Storage> rest(weight + whole, rows.dim - whole);
  store(y + whole, load(y + whole) * Storage::load_vec(rest.padded));
}

static void normalise(const InputRows& rows, int row, float* y) {
  if (rows.dtype == DType::kFloat32) normalise_row<Float32>(rows, row, y);
  if (rows.dtype == DType::kBFloat16) normalise_row<BFloat16>(rows, row, y);
  if (rows.dtype == DType::kFloat16) normalise_row<Float16>(rows, row, y);
  if (!rows.norm_weight) return;
  if (rows.norm_dtype == DType::kFloat32) weigh_row<Float32>(rows, y);
  if (rows.norm_dtype == DType::kBFloat16) weigh_row<BFloat16>(rows, y);
  if (rows.norm_dtype == DType::kFloat16) weigh_row<Float16>(rows, y);
}

const ProductKernels kProductKernels = {normalise, packed_bytes, pack, round, multiply};

}  // namespace specdec::cpu::SPECDEC_ISA

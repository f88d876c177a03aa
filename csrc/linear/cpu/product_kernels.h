// The products of few rows (linear/cpu/product_types.h) on one instruction set.
#pragma once

#include "common/cpu/simd_int.h"
#include "linear/cpu/finish.h"
#include "linear/cpu/float_rows.h"
#include "linear/cpu/product_types.h"

namespace specdec::cpu::SPECDEC_ISA {

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
  Vec squares[4];
  SPECDEC_UNROLL
  for (int i = 0; i < 4; i++) squares[i] = splat(0.0f);
  const auto take = [&](const auto* from, int d, Vec& sum) __attribute__((always_inline)) {
    const Vec v = Storage::load_vec(from);
    store(y + d, v);
    sum = fma(v, v, sum);
  };
  int d = 0;
  for (; d + 4 * kWidth <= whole; d += 4 * kWidth) {
    SPECDEC_UNROLL
    for (int i = 0; i < 4; i++) take(x + d + i * kWidth, d + i * kWidth, squares[i]);
  }
  for (; d < whole; d += kWidth) take(x + d, d, squares[0]);
  if (whole < rows.dim) take(Rest<Storage>(x + whole, rows.dim - whole).padded, whole, squares[0]);
  for (d = round_up(rows.dim, kWidth); d < round_up(rows.dim, kFloatRowStep); d += kWidth) store(y + d, splat(0.0f));
  if (!rows.norm_weight) return;
  const float sum = total((squares[0] + squares[1]) + (squares[2] + squares[3]));
  const Vec scale = splat(1.0f / __builtin_sqrtf(sum / float(rows.dim) + rows.norm_eps));
  for (d = 0; d < rows.dim; d += kWidth) store(y + d, load(y + d) * scale);
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

static void round_to_pairs(float* y, int dim) {
#if defined(__AVX512BF16__)
  for (int d = 0; d < dim; d += kWidth) {
    uint16_t rounded[kWidth];
    store_bf16(rounded, load(y + d));
    store(y + d, load_bf16(rounded));
  }
#else
  (void)y, (void)dim;
#endif
}

const ProductKernels kProductKernels = {
    normalise,
    round_to_pairs,
    finish,
    {form_of<Float32Form>(), form_of<WidenedForm<BFloat16>>(), form_of<WidenedForm<Float16>>(),
     form_of<WidenedForm<Int8>>(), form_of<WidenedBlocksForm<WeightType::kQ80>>(),
     form_of<WidenedBlocksForm<WeightType::kQ40>>(), form_of<WidenedBlocksForm<WeightType::kQ41>>()},
#if defined(__AVX512BF16__)
    form_of<PairsForm>()
#else
    {nullptr, nullptr, nullptr}
#endif
};

}  // namespace specdec::cpu::SPECDEC_ISA

// Norms rows on one instruction set: a row is read for its squares, then, from the first-level cache, for its result.
// Squares are summed in four vectors, whose order depends on dim alone.
#pragma once

#include "common/cpu/simd.h"
#include "linear/params.h"

namespace specdec::cpu::SPECDEC_ISA {

// Elements [at, at + kWidth) of a row of `dim`, zeros beyond its end.
template <class Storage>
static SPECDEC_INLINE Vec load_some(const typename Storage::Element* row, int at, int dim) {
  if (at + kWidth <= dim) return Storage::load_vec(row + at);
  typename Storage::Element tail[kWidth] = {};
  if (at < dim) __builtin_memcpy(tail, row + at, (dim - at) * sizeof(*tail));
  return Storage::load_vec(tail);
}

template <class Storage, class Weight>
static void rms_norm_row(const RmsNormParams& p, int64_t row) {
  using Element = typename Storage::Element;
  const Element* x = static_cast<const Element*>(p.x) + row * p.x_stride_row;
  const Element* residual =
      p.residual ? static_cast<const Element*>(p.residual) + row * p.residual_stride_row : nullptr;
  const auto* weight = static_cast<const typename Weight::Element*>(p.weight);
  Element* out = static_cast<Element*>(p.out) + row * p.out_stride_row;

  constexpr int kSums = 4;
  Vec squares[kSums] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
  for (int d = 0; d < p.dim; d += kSums * kWidth) {
    SPECDEC_UNROLL
    for (int i = 0; i < kSums; i++) {
      const Vec v = load_some<Storage>(x, d + i * kWidth, p.dim);
      squares[i] = fma(v, v, squares[i]);
    }
  }
  alignas(64) float lanes[kWidth];
  store(lanes, (squares[0] + squares[1]) + (squares[2] + squares[3]));
  float sum = 0;
  for (int i = 0; i < kWidth; i++) sum += lanes[i];
  const Vec scale = splat(1.0f / __builtin_sqrtf(sum / float(p.dim) + p.eps));

  for (int d = 0; d < p.dim; d += kWidth) {
    Vec y = load_some<Storage>(x, d, p.dim) * scale * load_some<Weight>(weight, d, p.dim);
    if (residual) y = y + load_some<Storage>(residual, d, p.dim);
    if (d + kWidth <= p.dim) {
      Storage::store_vec(out + d, y);
    } else {
      Element tail[kWidth];
      Storage::store_vec(tail, y);
      __builtin_memcpy(out + d, tail, (p.dim - d) * sizeof(Element));
    }
  }
}

template <class Storage>
static void rms_norm_rows_of(const RmsNormParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (p.weight_dtype == DType::kFloat32) {
      rms_norm_row<Storage, Float32>(p, row);
    } else {
      rms_norm_row<Storage, Storage>(p, row);
    }
  }
}

void rms_norm_rows(const RmsNormParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kFloat32:
      return rms_norm_rows_of<Float32>(p, begin, end);
    case DType::kBFloat16:
      return rms_norm_rows_of<BFloat16>(p, begin, end);
    case DType::kFloat16:
      return rms_norm_rows_of<Float16>(p, begin, end);
  }
}

}  // namespace specdec::cpu::SPECDEC_ISA

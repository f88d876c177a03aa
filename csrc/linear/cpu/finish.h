// What is done with a tile's sums: scales of the weights, bias, activation and residual, all in float32, and one rounding.
#pragma once

#include "common/cpu/simd.h"
#include "linear/cpu/product_types.h"

namespace specdec::cpu::SPECDEC_ISA {

constexpr int kGateTile = kWeightTile / 2;  // with an activation a tile has so many rows of each half

// `count` elements in float32 from any dtype, and zeros as far as whole vectors.
template <class Storage>
static SPECDEC_INLINE void widen_elements(const void* from, int64_t first, int count, float* to) {
  const auto* at = static_cast<const typename Storage::Element*>(from) + first;
  int i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, Storage::load_vec(at + i));
  if (i == count) return;
  typename Storage::Element rest[kWidth] = {};
  __builtin_memcpy(rest, at + i, (count - i) * sizeof(rest[0]));
  store(to + i, Storage::load_vec(rest));
}

static void widen_elements(const void* from, DType type, int64_t first, int count, float* to) {
  if (type == DType::kFloat32) widen_elements<Float32>(from, first, count, to);
  if (type == DType::kBFloat16) widen_elements<BFloat16>(from, first, count, to);
  if (type == DType::kFloat16) widen_elements<Float16>(from, first, count, to);
}

template <class Storage>
static SPECDEC_INLINE void narrow_elements(const float* from, int count, void* to, int64_t first) {
  auto* at = static_cast<typename Storage::Element*>(to) + first;
  int i = 0;
  for (; i + kWidth <= count; i += kWidth) Storage::store_vec(at + i, load(from + i));
  if (i == count) return;
  typename Storage::Element rest[kWidth];
  Storage::store_vec(rest, load(from + i));
  __builtin_memcpy(at + i, rest, (count - i) * sizeof(rest[0]));
}

// x / (1 + exp(-x)), by an exponential that does not overflow.
static SPECDEC_INLINE Vec silu(Vec x) {
  const Vec size = maximum(x, splat(0.0f) - x);
  const Vec e = exp2(size * splat(-kLog2E));
  return x * (x < splat(0.0f) ? e : splat(1.0f)) / (splat(1.0f) + e);
}

// x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2, which is x / (1 + exp(-2 * that)).
static SPECDEC_INLINE Vec gelu(Vec x) {
  const Vec inner = x * fma(x * x, splat(0.044715f), splat(1.0f)) * splat(2 * 0.7978845608028654f);
  const Vec size = maximum(inner, splat(0.0f) - inner);
  const Vec e = exp2(size * splat(-kLog2E));
  return x * (inner < splat(0.0f) ? e : splat(1.0f)) / (splat(1.0f) + e);
}

static void finish(const LinearParams& p, const float* sums, int first_row, int rows, int first_output, int outputs) {
  const int halves = p.activation == Activation::kNone ? 1 : 2;
  alignas(64) float scales[2][kWeightTile], bias[2][kWeightTile], values[kWeightTile], residual[kWeightTile];
  for (int half = 0; half < halves; half++) {
    const int64_t first = half * int64_t(p.outputs) + first_output;
    if (p.scales) widen_elements<Float32>(p.scales, first, outputs, scales[half]);
    if (p.bias) widen_elements(p.bias, p.bias_dtype, first, outputs, bias[half]);
  }
  for (int row = 0; row < rows; row++, sums += kWeightTile) {
    const int64_t at = first_row + row;
    if (p.residual) widen_elements(p.residual, p.dtype, at * p.residual_stride_row + first_output, outputs, residual);
    for (int i = 0; i < outputs; i += kWidth) {
      const auto half = [&](int half) __attribute__((always_inline)) {
        Vec sum = load(sums + half * kGateTile + i);
        if (p.scales) sum = sum * load(scales[half] + i);
        return p.bias ? sum + load(bias[half] + i) : sum;
      };
      Vec value = half(0);
      if (p.activation == Activation::kSwiglu) value = silu(value) * half(1);
      if (p.activation == Activation::kGeglu) value = gelu(value) * half(1);
      store(values + i, p.residual ? value + load(residual + i) : value);
    }
    const int64_t to = at * p.out_stride_row + first_output;
    if (p.dtype == DType::kFloat32) narrow_elements<Float32>(values, outputs, p.out, to);
    if (p.dtype == DType::kBFloat16) narrow_elements<BFloat16>(values, outputs, p.out, to);
    if (p.dtype == DType::kFloat16) narrow_elements<Float16>(values, outputs, p.out, to);
  }
}

}  // namespace specdec::cpu::SPECDEC_ISA

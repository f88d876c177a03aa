// Plain structs of linear and rms_norm, shared by the CPU kernel, the CUDA launcher and the bindings. See common/types.h.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "linear/weight_type.h"

namespace specdec {

enum class Activation : int32_t { kNone = 0, kSwiglu = 1, kGeglu = 2 };

// out = act(y @ weight^T + bias) + residual, with y = x or its RMSNorm. The weight has `outputs` rows, or with an
// activation 2 * outputs: act(products of the first half) * products of the second.
struct LinearParams {
  const void* x;            // [rows, dim]
  const void* weight;       // [weight_rows, dim], contiguous: elements, or blocks
  const float* scales;      // [weight_rows] of int8 weights, else nullptr
  const void* bias;         // [weight_rows] or nullptr
  const void* norm_weight;  // [dim], or nullptr: no norm
  const void* residual;     // [rows, outputs] or nullptr
  void* out;                // [rows, outputs]; may be residual
  int64_t x_stride_row, residual_stride_row, out_stride_row;
  DType dtype;  // of x, residual and out
  DType bias_dtype, norm_dtype;
  WeightType weight_type;
  Activation activation;
  int32_t rows, dim, outputs;
  float norm_eps;
};

// out = x / sqrt(mean(x^2) + eps) * weight + residual
struct RmsNormParams {
  const void* x;         // [rows, dim]
  const void* weight;    // [dim]
  const void* residual;  // [rows, dim] or nullptr
  void* out;             // [rows, dim]; may be x or residual
  int64_t x_stride_row, residual_stride_row, out_stride_row;
  DType dtype;  // of x, residual and out
  DType weight_dtype;
  int32_t rows, dim;
  float eps;
};

}  // namespace specdec

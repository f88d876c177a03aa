// linear on CPUs: a plain loop. An output is made by one thread, from its first product to its last.
#include <cmath>
#include <cstring>
#include <vector>

#include "linear/cpu/entry_points.h"

namespace specdec {
namespace {

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

float from_float16(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  const float value = magnitude < 0x400 ? float(magnitude) * 0x1p-24f : from_bits((magnitude << 13) + 0x38000000);
  return sign ? -value : value;
}

uint16_t to_float16(float value) {
  const uint16_t sign = uint16_t(to_bits(value) >> 16 & 0x8000);
  const float magnitude = std::fabs(value);
  if (magnitude != magnitude) return sign | 0x7e00;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude < 0x1p-14f) return sign | uint16_t(to_bits(magnitude + 0.5f) - 0x3f000000);
  const uint32_t bits = to_bits(magnitude);
  return sign | uint16_t((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

uint16_t to_bfloat16(float value) {
  const uint32_t bits = to_bits(value);
  return value != value ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float element(const void* from, DType type, int64_t index) {
  if (type == DType::kFloat32) return static_cast<const float*>(from)[index];
  const uint16_t bits = static_cast<const uint16_t*>(from)[index];
  return type == DType::kBFloat16 ? from_bits(uint32_t(bits) << 16) : from_float16(bits);
}

void put(void* to, DType type, int64_t index, float value) {
  if (type == DType::kFloat32) {
    static_cast<float*>(to)[index] = value;
  } else {
    static_cast<uint16_t*>(to)[index] = type == DType::kBFloat16 ? to_bfloat16(value) : to_float16(value);
  }
}

void widen(const LinearParams& p, int64_t row, float* to) {
  const char* from = static_cast<const char*>(p.weight) + row * weight_row_bytes(p.weight_type, p.dim);
  if (!has_blocks(p.weight_type)) {
    for (int d = 0; d < p.dim; ++d) {
      to[d] = p.weight_type == WeightType::kInt8 ? p.scales[row] * reinterpret_cast<const int8_t*>(from)[d]
                                                 : element(from, static_cast<DType>(p.weight_type), d);
    }
    return;
  }
  for (int d = 0; d < p.dim; d += kBlockElements, from += block_bytes(p.weight_type)) {
    uint16_t head[2];
    std::memcpy(head, from, 4);
    const float scale = from_float16(head[0]), least = from_float16(head[1]);
    const char* at = from + (p.weight_type == WeightType::kQ41 ? 4 : 2);
    for (int i = 0; i < kBlockElements; ++i) {
      if (p.weight_type == WeightType::kQ80) {
        to[d + i] = scale * float(int8_t(at[i]));
      } else {
        const int quarter = uint8_t(at[i % 16]) >> (i < 16 ? 0 : 4) & 15;
        to[d + i] = p.weight_type == WeightType::kQ40 ? scale * float(quarter - 8) : scale * float(quarter) + least;
      }
    }
  }
}

float activated(Activation activation, float gate) {
  if (activation == Activation::kSwiglu) return gate / (1 + std::exp(-gate));
  return 0.5f * gate * (1 + std::tanh(0.7978845608f * (gate + 0.044715f * gate * gate * gate)));
}

}  // namespace

void linear_cpu(const LinearParams& p, int threads) {
  std::vector<float> y(int64_t(p.rows) * p.dim);
  for (int64_t row = 0; row < p.rows; ++row) {
    double squares = 0;
    for (int d = 0; d < p.dim; ++d) {
      const float value = y[row * p.dim + d] = element(p.x, p.dtype, row * p.x_stride_row + d);
      squares += double(value) * value;
    }
    const float scale = float(1 / std::sqrt(squares / p.dim + double(p.norm_eps)));
    for (int d = 0; d < p.dim && p.norm_weight; ++d) {
      y[row * p.dim + d] *= scale * element(p.norm_weight, p.norm_dtype, d);
    }
  }
  const int halves = p.activation == Activation::kNone ? 1 : 2;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t output = 0; output < p.outputs; ++output) {
    std::vector<float> weights(size_t(halves) * p.dim);
    for (int half = 0; half < halves; ++half)
      widen(p, half * int64_t(p.outputs) + output, &weights[half * size_t(p.dim)]);
    for (int64_t row = 0; row < p.rows; ++row) {
      float sums[2] = {};
      for (int half = 0; half < halves; ++half) {
        for (int d = 0; d < p.dim; ++d) sums[half] += y[row * p.dim + d] * weights[half * size_t(p.dim) + d];
        if (p.bias) sums[half] += element(p.bias, p.bias_dtype, half * int64_t(p.outputs) + output);
      }
      float value = halves == 1 ? sums[0] : activated(p.activation, sums[0]) * sums[1];
      if (p.residual) value += element(p.residual, p.dtype, row * p.residual_stride_row + output);
      put(p.out, p.dtype, row * p.out_stride_row + output, value);
    }
  }
}

}  // namespace specdec

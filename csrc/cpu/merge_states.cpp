// Merges two partial attentions over disjoint slots: weights exp(lse - the larger lse), one pass, 3 * dim elements
// moved a row. A state that saw nothing has lse -inf and weight 0; two of them merge to 0 and -inf.
#include <cmath>
#include <cstring>

#include "cpu/kernels.h"

namespace specdec {
namespace {

float widen(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

struct Float32 {
  using Element = float;
  static float load(float x) { return x; }
  static float store(float x) { return x; }
};

struct BFloat16 {
  using Element = uint16_t;
  static float load(uint16_t x) { return widen(uint32_t(x) << 16); }
  static uint16_t store(float x) {
    const uint32_t bits = bits_of(x);
    return std::isnan(x) ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
};

struct Float16 {
  using Element = uint16_t;
  static float load(uint16_t x) {
    const uint32_t magnitude = x & 0x7fff, sign = uint32_t(x & 0x8000) << 16;
    const float value = magnitude < 0x400
                            ? float(magnitude) * 0x1p-24f
                            : widen((magnitude << 13) + (magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u));
    return widen(bits_of(value) | sign);
  }
  static uint16_t store(float x) {
    const uint32_t sign = (bits_of(x) >> 16) & 0x8000, magnitude = bits_of(x) & 0x7fffffff;
    if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (magnitude < 0x38800000) return uint16_t(sign | (bits_of(widen(magnitude) + 0.5f) - 0x3f000000));
    return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
  }
};

template <class Storage>
void merge_rows(const MergeStatesParams& p, int threads) {
  using Element = typename Storage::Element;
  const Element* out_a = static_cast<const Element*>(p.out_a);
  const Element* out_b = static_cast<const Element*>(p.out_b);
  Element* out = static_cast<Element*>(p.out);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && p.rows * p.dim > (1 << 15))
  for (int64_t row = 0; row < p.rows; row++) {
    const float a = p.lse_a[row], b = p.lse_b[row];
    const float top = a > b || std::isnan(a) ? a : b;
    const bool nothing = top == -INFINITY;
    const float weight_a = nothing ? 0.0f : std::exp(a - top), weight_b = nothing ? 0.0f : std::exp(b - top);
    const float sum = weight_a + weight_b;
    const float scale_a = nothing ? 0.0f : weight_a / sum, scale_b = nothing ? 0.0f : weight_b / sum;
    for (int64_t i = row * p.dim; i < (row + 1) * p.dim; i++)
      out[i] = Storage::store(Storage::load(out_a[i]) * scale_a + Storage::load(out_b[i]) * scale_b);
    p.lse[row] = nothing ? -INFINITY : top + std::log(sum);
  }
}

}  // namespace

void merge_states_cpu(const MergeStatesParams& p, int threads) {
  switch (p.dtype) {
    case DType::kFloat32:
      return merge_rows<Float32>(p, threads);
    case DType::kBFloat16:
      return merge_rows<BFloat16>(p, threads);
    case DType::kFloat16:
      return merge_rows<Float16>(p, threads);
  }
}

}  // namespace specdec

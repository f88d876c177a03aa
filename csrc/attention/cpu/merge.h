// Merges two partial attentions over disjoint slots: weights exp(lse - the larger lse), one pass, 3 * dim elements
// moved a row. A state that saw nothing has lse -inf and weight 0, whatever its output holds; two of them merge to 0
// and -inf. An lse of NaN or +inf makes the row NaN.
#pragma once

#include "attention/params.h"
#include "common/cpu/simd.h"

namespace specdec::cpu::SPECDEC_ISA {

template <class Storage>
static void merge_rows_of(const MergeStatesParams& p, int64_t begin, int64_t end) {
  using Element = typename Storage::Element;
  const int whole = p.dim / kWidth * kWidth;
  for (int64_t row = begin; row < end; row++) {
    const float a = p.lse_a[row], b = p.lse_b[row], top = a > b || a != a ? a : b;  // +inf gives NaN, too
    const bool nothing = top == -__builtin_inff();
    const float weight_a = nothing ? 0.0f : __builtin_expf(a - top),
                weight_b = nothing ? 0.0f : __builtin_expf(b - top);
    const float sum = weight_a + weight_b;
    p.lse[row] = nothing ? top : top + __builtin_logf(sum);

    // A part of weight 0 is not read: it may be NaN.
    const Element *from_a = static_cast<const Element*>(p.out_a) + row * p.dim,
                  *from_b = static_cast<const Element*>(p.out_b) + row * p.dim;
    const float scale_a = weight_a == 0 ? 0.0f : weight_a / sum, scale_b = weight_b == 0 ? 0.0f : weight_b / sum;
    Element* out = static_cast<Element*>(p.out) + row * p.dim;
    const auto merged = [&](const Element* at_a, const Element* at_b) {
      Vec total = splat(0.0f);
      if (scale_a != 0) total = Storage::load_vec(at_a) * splat(scale_a);
      if (scale_b != 0) total = fma(Storage::load_vec(at_b), splat(scale_b), total);
      return total;
    };
    for (int d = 0; d < whole; d += kWidth) Storage::store_vec(out + d, merged(from_a + d, from_b + d));
    if (whole < p.dim) {
      Element tail_a[kWidth] = {}, tail_b[kWidth] = {}, tail[kWidth];
      __builtin_memcpy(tail_a, from_a + whole, (p.dim - whole) * sizeof(Element));
      __builtin_memcpy(tail_b, from_b + whole, (p.dim - whole) * sizeof(Element));
      Storage::store_vec(tail, merged(tail_a, tail_b));
      __builtin_memcpy(out + whole, tail, (p.dim - whole) * sizeof(Element));
    }
  }
}

// 2^x of many numbers, so that the tests can measure the exponentials; `weights`: the one for bfloat16 weights.
void exp2_values(const float* x, float* y, int64_t count, bool weights) {
  for (int64_t i = 0; i + kWidth <= count; i += kWidth)
    store(y + i, weights ? exp2_bf16(load(x + i)) : exp2(load(x + i)));
}

void merge_rows(const MergeStatesParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kFloat32:
      return merge_rows_of<Float32>(p, begin, end);
    case DType::kBFloat16:
      return merge_rows_of<BFloat16>(p, begin, end);
    case DType::kFloat16:
      return merge_rows_of<Float16>(p, begin, end);
  }
}

}  // namespace specdec::cpu::SPECDEC_ISA

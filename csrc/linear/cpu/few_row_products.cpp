// Which kernels multiply a call's rows.
#include "linear/cpu/few_row_products.h"

#include <cmath>
#include <numeric>

#include "common/cpu/isa.h"

namespace specdec::cpu {

const ProductKernels& product_kernels() {
#ifdef SPECDEC_X86
#ifdef SPECDEC_HAVE_AVX512_BF16
  if (current_isa() >= Isa::kAvx512Bf16) return avx512_bf16::kProductKernels;
#endif
  if (current_isa() >= Isa::kAvx512) return avx512::kProductKernels;
  if (current_isa() >= Isa::kAvx2) return avx2::kProductKernels;
#endif
  return generic::kProductKernels;
}

ProductForm product_form(WeightType type, bool may_round) {
  const ProductKernels& kernels = product_kernels();
  if (may_round && type == WeightType::kBFloat16 && kernels.pairs.multiply) return kernels.pairs;
#ifdef SPECDEC_HAVE_AVX512_VNNI
  if (may_round && type >= WeightType::kInt8 && may_use_vnni()) {
    using namespace avx512_vnni;
    return type == WeightType::kInt8  ? kInt8Form
           : type == WeightType::kQ80 ? kQ80Form
           : type == WeightType::kQ40 ? kQ40Form
                                      : kQ41Form;
  }
#endif
  return kernels.widened[int(type)];
}

void round_row(const ProductForm& form, std::vector<float>& y) {
  const ProductKernels& kernels = product_kernels();
  if (form.pack == kernels.pairs.pack) kernels.round(y.data(), int(y.size()));
}

RowLength row_length(const ProductForm& form, const std::vector<float>& y, int dim) {
  constexpr int kSums = 8;  // at once
  static_assert(kFloatRowStep % kSums == 0, "");
  double squares[kSums] = {}, rounding = 0;
  for (size_t d = 0; d < y.size(); d += kSums) {
    for (int i = 0; i < kSums; i++) squares[i] += double(y[d + i]) * y[d + i];
  }
#ifdef SPECDEC_HAVE_AVX512_VNNI
  if (form.pack == avx512_vnni::kInt8Form.pack) rounding = avx512_vnni::rounding_error(y.data(), dim);
#else
  (void)form, (void)dim;
#endif
  return {std::sqrt(std::accumulate(squares, squares + kSums, 0.0)), rounding};
}

}  // namespace specdec::cpu

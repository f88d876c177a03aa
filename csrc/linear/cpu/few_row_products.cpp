// Which kernels multiply a call's rows.
#include "linear/cpu/few_row_products.h"

#include <cmath>
#include <numeric>

#include "common/cpu/isa.h"

namespace specdec::cpu {
namespace {

const ProductKernels& kernels_of_isa() {
#ifdef SPECDEC_X86
#ifdef SPECDEC_HAVE_AVX512_BF16
  if (current_isa() >= Isa::kAvx512Bf16) return avx512_bf16::kProductKernels;
#endif
  if (current_isa() >= Isa::kAvx512) return avx512::kProductKernels;
  if (current_isa() >= Isa::kAvx2) return avx2::kProductKernels;
#endif
  return generic::kProductKernels;
}

}  // namespace

ProductKernels product_kernels(HeadType type, int dim, bool may_round) {
  ProductKernels kernels = kernels_of_isa();
#ifdef SPECDEC_HAVE_AVX512_VNNI
  if (type == HeadType::kInt8 && may_round && dim <= kMaxIntegerDim && may_use_vnni()) {
    kernels.packed_bytes = avx512_vnni::packed_bytes;
    kernels.pack = avx512_vnni::pack;
    kernels.multiply = avx512_vnni::multiply;
  }
#else
  (void)type, (void)dim, (void)may_round;
#endif
  return kernels;
}

RowLength row_length(const ProductKernels& kernels, const std::vector<float>& y, int dim) {
  constexpr int kSums = 8;  // at once
  static_assert(kFloatRowStep % kSums == 0, "");
  double squares[kSums] = {}, rounding = 0;
  for (size_t d = 0; d < y.size(); d += kSums) {
    for (int i = 0; i < kSums; i++) squares[i] += double(y[d + i]) * y[d + i];
  }
#ifdef SPECDEC_HAVE_AVX512_VNNI
  if (kernels.pack == avx512_vnni::pack) rounding = avx512_vnni::rounding_error(y.data(), dim);
#else
  (void)kernels, (void)dim;
#endif
  return {std::sqrt(std::accumulate(squares, squares + kSums, 0.0)), rounding};
}

}  // namespace specdec::cpu

#define SPECDEC_ISA avx512_bf16
#include "cpu/multiply.h"

namespace specdec::SPECDEC_ISA {

// A handful of rows is left to the AVX-512 kernels: they wait for memory, not for products.
const LaneKernel* select_kernel(DType dtype, int rows, int) {
  return dtype == DType::kBFloat16 && rows > kMostNarrowRows ? &kWideKernel<DotEngine> : nullptr;
}

}  // namespace specdec::SPECDEC_ISA

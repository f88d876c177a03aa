#define SPECDEC_ISA avx512_bf16
#include "cpu/multiply.h"

namespace specdec::SPECDEC_ISA {

const LaneKernel* select_kernel(DType dtype, int, int) {
  return dtype == DType::kBFloat16 ? &kWideKernel<DotEngine> : nullptr;
}

}  // namespace specdec::SPECDEC_ISA

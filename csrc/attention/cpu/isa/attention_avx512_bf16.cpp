#define SPECDEC_ISA avx512_bf16
#include "attention/cpu/engine_few_rows_bf16.h"

namespace specdec::SPECDEC_ISA {

const LaneKernel* select_kernel(DType dtype, int rows, int) {
  if (dtype != DType::kBFloat16) return nullptr;
  if (rows == 1) return &kWideKernel<NarrowPairsEngine<1>>;
  if (rows <= kMostNarrowRows) return &kWideKernel<NarrowPairsEngine<4>>;
  return &kWideKernel<DotEngine>;
}

}  // namespace specdec::SPECDEC_ISA

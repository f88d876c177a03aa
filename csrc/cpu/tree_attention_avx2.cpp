#define SPECDEC_ISA avx2
#include "cpu/multiply.h"

namespace specdec::SPECDEC_ISA {

const LaneKernel* select_kernel(DType dtype, int, int) {
  switch (dtype) {
    case DType::kFloat32:
      return &kWideKernel<FloatEngine<Float32, 2, 96, false>>;
    case DType::kBFloat16:
      return &kWideKernel<FloatEngine<BFloat16, 2, 96, false>>;
    case DType::kFloat16:
      return &kWideKernel<FloatEngine<Float16, 2, 96, false>>;
  }
  return nullptr;
}

}  // namespace specdec::SPECDEC_ISA

#define SPECDEC_ISA generic
#include "cpu/multiply.h"

namespace specdec::SPECDEC_ISA {

// Any processor: the compiler lowers eight-lane vectors to what the target has. Few accumulators, since a baseline
// x86-64 has sixteen registers of four lanes.
const LaneKernel* select_kernel(DType dtype, int, int) {
  switch (dtype) {
    case DType::kFloat32:
      return &kWideKernel<FloatEngine<Float32, 1, 64, false>>;
    case DType::kBFloat16:
      return &kWideKernel<FloatEngine<BFloat16, 1, 64, false>>;
    case DType::kFloat16:
      return &kWideKernel<FloatEngine<Float16, 1, 64, false>>;
  }
  return nullptr;
}

}  // namespace specdec::SPECDEC_ISA

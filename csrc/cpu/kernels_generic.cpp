#define SPECDEC_ISA generic
#include "cpu/merge.h"
#include "cpu/narrow.h"

namespace specdec::SPECDEC_ISA {

// Any processor: the compiler lowers eight-lane vectors to what the target has. Few accumulators, since a baseline
// x86-64 has sixteen registers of four lanes.
template <class Storage, bool kKeysInPlace>
static const LaneKernel* select_for(int rows) {
  const LaneKernel* narrow = narrow_kernel<Storage>(rows);
  return narrow ? narrow : &kWideKernel<FloatEngine<Storage, 1, 64, kKeysInPlace>>;
}

const LaneKernel* select_kernel(DType dtype, int rows, int) {
  switch (dtype) {
    case DType::kFloat32:
      return select_for<Float32, false>(rows);
    case DType::kBFloat16:
      return select_for<BFloat16, false>(rows);
    case DType::kFloat16:
      return select_for<Float16, false>(rows);
  }
  return nullptr;
}

}  // namespace specdec::SPECDEC_ISA

#define SPECDEC_ISA avx512
#include "cpu/merge.h"
#include "cpu/narrow.h"

namespace specdec::SPECDEC_ISA {

template <class Storage, bool kKeysInPlace>
static const LaneKernel* select_for(int rows) {
  const LaneKernel* narrow = narrow_kernel<Storage>(rows);
  return narrow ? narrow : &kWideKernel<FloatEngine<Storage, 2, 64, kKeysInPlace>>;
}

const LaneKernel* select_kernel(DType dtype, int rows, int) {
  switch (dtype) {
    case DType::kFloat32:
      return select_for<Float32, true>(rows);
    case DType::kBFloat16:
      return select_for<BFloat16, false>(rows);
    case DType::kFloat16:
      return select_for<Float16, false>(rows);
  }
  return nullptr;
}

}  // namespace specdec::SPECDEC_ISA

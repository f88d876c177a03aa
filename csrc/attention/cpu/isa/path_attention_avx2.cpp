#define SPECDEC_ISA avx2
#include "attention/cpu/path_attention.h"

namespace specdec::cpu::SPECDEC_ISA {

const PathKernel* select_path_kernel(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return &kPathAttention<PathFloats<Float32>>;
    case DType::kBFloat16:
      return &kPathAttention<PathFloats<BFloat16>>;
    case DType::kFloat16:
      return &kPathAttention<PathFloats<Float16>>;
  }
  return nullptr;
}

}  // namespace specdec::cpu::SPECDEC_ISA

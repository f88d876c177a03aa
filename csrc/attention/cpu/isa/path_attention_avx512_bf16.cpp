#define SPECDEC_ISA avx512_bf16
#include "attention/cpu/path_attention.h"

namespace specdec::cpu::SPECDEC_ISA {

const PathKernel* select_path_kernel(DType dtype) {
  return dtype == DType::kBFloat16 ? &kPathAttention<PathPairs> : nullptr;
}

}  // namespace specdec::cpu::SPECDEC_ISA

#define SPECDEC_ISA avx512_bf16
#include "attention/cpu/engine_few_rows_bf16.h"

namespace specdec::cpu::SPECDEC_ISA {

const TaskKernel* select_kernel(DType dtype, int rows, int) {
  if (dtype != DType::kBFloat16) return nullptr;
  if (rows == 1) return &kAttentionKernel<FewRowsBf16Engine<1>>;
  if (rows <= kMaxFewRows) return &kAttentionKernel<FewRowsBf16Engine<4>>;
  return &kAttentionKernel<DotEngine>;
}

}  // namespace specdec::cpu::SPECDEC_ISA

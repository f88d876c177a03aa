#define SPECDEC_ISA amx
#include "attention/cpu/engine_amx_rows.h"

namespace specdec::cpu::SPECDEC_ISA {

// Packing V for the matrix unit pays above this many rows (measured at dim 128: equal at 32 to 48 rows).
constexpr int kMaxRowsOfRowsEngine = 32;

const TaskKernel* select_kernel(DType dtype, int rows, int) {
  if (dtype != DType::kBFloat16) return nullptr;
  return rows <= kMaxRowsOfRowsEngine ? &kAttentionKernel<AmxRowsEngine> : &kAttentionKernel<AmxEngine<128>>;
}

}  // namespace specdec::cpu::SPECDEC_ISA

#define SPECDEC_ISA generic
#include "attention/cpu/engine_few_rows.h"
#include "attention/cpu/merge.h"

namespace specdec::cpu::SPECDEC_ISA {

// Any processor: the compiler lowers eight-lane vectors to what the target has. Few accumulators, since a baseline
// x86-64 has sixteen registers of four lanes.
const TaskKernel* select_kernel(DType dtype, int rows, int) { return select_float_kernel<1, 64>(dtype, rows); }

}  // namespace specdec::cpu::SPECDEC_ISA

#define SPECDEC_ISA avx512
#include "attention/cpu/engine_few_rows.h"
#include "attention/cpu/merge.h"

namespace specdec::cpu::SPECDEC_ISA {

// Eight slots by two vectors of rows, or sixteen by one.
const TaskKernel* select_kernel(DType dtype, int rows, int) { return select_float_kernel<2, 64>(dtype, rows); }

}  // namespace specdec::cpu::SPECDEC_ISA

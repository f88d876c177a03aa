#define SPECDEC_ISA avx512
#include "attention/cpu/engine_few_rows.h"
#include "attention/cpu/merge.h"

namespace specdec::cpu::SPECDEC_ISA {

// Six slots by four vectors of rows, twelve by two, or sixteen by one.
const TaskKernel* select_kernel(DType dtype, int rows, int) { return select_float_kernel<4, 96>(dtype, rows); }

}  // namespace specdec::cpu::SPECDEC_ISA

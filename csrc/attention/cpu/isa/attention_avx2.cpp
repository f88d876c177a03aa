#define SPECDEC_ISA avx2
#include "attention/cpu/engine_few_rows.h"
#include "attention/cpu/merge.h"

namespace specdec::cpu::SPECDEC_ISA {

// Six slots by two vectors of rows: twelve of the sixteen registers accumulate.
const TaskKernel* select_kernel(DType dtype, int rows, int) { return select_float_kernel<2, 96>(dtype, rows); }

}  // namespace specdec::cpu::SPECDEC_ISA

#define SPECDEC_ISA amx
#include "cpu/matrix_rows.h"

namespace specdec::SPECDEC_ISA {

// Packing V for the matrix unit pays from about this many rows (measured; see cpu/matrix_rows.h).
#ifndef ROWS_LIMIT
#define ROWS_LIMIT 96
#endif
constexpr int kFewRows = ROWS_LIMIT;

const LaneKernel* select_kernel(DType dtype, int rows, int) {
  if (dtype != DType::kBFloat16) return nullptr;
  return rows <= kFewRows ? &kWideKernel<MatrixRowsEngine> : &kWideKernel<MatrixEngine<128>>;
}

}  // namespace specdec::SPECDEC_ISA

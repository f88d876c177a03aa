// The row-wise kernels of attention, for each instruction set.
#pragma once

#include <cstdint>

#include "attention/params.h"

namespace specdec::cpu {

// The row-wise kernels of each instruction set (attention/cpu/merge.h).
#define SPECDEC_ROW_KERNELS(isa)                                           \
  namespace isa {                                                          \
  void merge_rows(const MergeStatesParams& p, int64_t begin, int64_t end); \
  void exp2_values(const float* x, float* y, int64_t count, bool weights); \
  }
SPECDEC_ROW_KERNELS(generic)
SPECDEC_ROW_KERNELS(avx2)
SPECDEC_ROW_KERNELS(avx512)
#undef SPECDEC_ROW_KERNELS

}  // namespace specdec::cpu

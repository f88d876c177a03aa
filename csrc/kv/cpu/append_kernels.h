// The row-wise kernel of kv_append, for each instruction set (kv/cpu/kv_append.h).
#pragma once

#include <cstdint>

#include "kv/params.h"

namespace specdec::cpu {

#define SPECDEC_APPEND_KERNELS(isa)                                              \
  namespace isa {                                                                \
  void append_rows(const KvAppendParams& p, int64_t begin, int64_t end, float*); \
  }
SPECDEC_APPEND_KERNELS(generic)
SPECDEC_APPEND_KERNELS(avx2)
SPECDEC_APPEND_KERNELS(avx512)
#undef SPECDEC_APPEND_KERNELS

}  // namespace specdec::cpu

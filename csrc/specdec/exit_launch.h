// Calls of the CUDA early exit kernels: the parameters that all backends share, and where scratch lies.
#pragma once

#include "specdec/exit_params.h"

namespace specdec {

struct ExitLaunch {
  ExitParams call;
  uint8_t* scratch;         // may hold anything
  int32_t* counters;        // zero before the first call; every call leaves zeros
  int32_t multiprocessors;  // of the device

  // Filled in by the launcher.
  int32_t blocks;                                   // that share the vocabulary
  int32_t row_blocks;                               // of hidden rows
  int64_t keys;                                     // where the lists begin in the scratch
  bool hidden_aligned, norm_aligned, head_aligned;  // whether their rows start at multiples of 16 bytes
};

}  // namespace specdec

// Calls of the CUDA early exit kernels: the parameters that all backends share, and where scratch lies.
#pragma once

#include "specdec/exit_params.h"

namespace specdec {

struct ExitLaunch {
  ExitParams call;
  uint8_t* scratch;         // may hold anything
  int32_t* counters;        // zero before the first call; every call leaves zeros
  int32_t multiprocessors;  // of the device

  // Of the screened form: the rows that it gave up, with their number behind them, and how many entries each has read.
  const int32_t* fallen;  // [rows + 1], or nullptr: all rows
  int32_t* rechecked;     // [rows]

  // Filled in by the launcher.
  int32_t blocks;                                   // that share the vocabulary
  int32_t row_blocks;                               // of hidden rows
  int64_t keys;                                     // where the lists begin in the scratch
  bool hidden_aligned, norm_aligned, head_aligned;  // whether their rows start at multiples of 16 bytes
};

struct ScreenLaunch {
  ScreenedParams call;
  uint8_t* scratch;         // as above
  int32_t* counters;        // as above
  int32_t multiprocessors;  // as above

  // Filled in by the launcher. Where each part begins in the scratch, whose first one is an ExitLaunch's:
  int64_t keys, approximate, counts, plans, known, known_keys, tails, fallen;
  int64_t stride;         // approximations from one row to the next
  int32_t blocks, spans;  // that share the vocabulary: of the first launch, and for each row of the second
  int32_t row_blocks;     // of the first launch
  int32_t first_counter;  // of the second launch
  bool hidden_aligned, norm_aligned, head_aligned, values_aligned;
};

}  // namespace specdec

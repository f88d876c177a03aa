// A call of the CUDA kernel of exit_mlp: the parameters that all backends share, and where scratch lies.
#pragma once

#include "early_exit/params.h"

namespace specdec {

struct MlpLaunch {
  MlpParams call;
  uint8_t* scratch;   // may hold anything
  int32_t* counters;  // zero before the first call; every call leaves zeros

  // Filled in by the launcher.
  int32_t row_block;                // rows of a block: 4 or 8
  int32_t units;                    // of the first layer, in a block
  int32_t splits;                   // blocks that share a block of rows
  int32_t fan;                      // of these, so many are joined first
  int32_t wide;                     // the most outputs of a layer from the second one on
  int32_t first_block, row_blocks;  // of rows: of this launch, and in all
};

}  // namespace specdec

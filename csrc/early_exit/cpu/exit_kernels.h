// What exit_confidence asks of each instruction set besides products (linear/cpu/product_types.h): the statistics of
// a row's logits.
#pragma once

#include <cstdint>

#include "early_exit/params.h"
#include "linear/cpu/product_types.h"

namespace specdec::cpu {

// What a row knows of the part of the vocabulary that it has seen. Values are logits before the temperature.
struct ExitState {
  float sum;                 // of exp((z - value[0]) / T)
  float weighted_logit_sum;  // of the same times (z - value[0])
  bool invalid;
  // As many as are listed of the greatest logits, descending, the lowest entry first among equals, -inf where there are
  // no more; and their places in the vocabulary.
  float value[kMaxTopK];
  int32_t entry[kMaxTopK];
};

struct ExitKernels {
  // Takes one row's logits in, which are -inf where a tile has no more. scales and bias are [kWeightTile] or nullptr;
  // the logits are changed by them.
  void (*absorb)(float* logits, const float* scales, const float* bias, int32_t first_entry, float factor, int top_k,
                 ExitState& state);
};

namespace generic {
extern const ExitKernels kExitKernels;
}
namespace avx2 {
extern const ExitKernels kExitKernels;
}
namespace avx512 {
extern const ExitKernels kExitKernels;
}
namespace avx512_bf16 {
extern const ExitKernels kExitKernels;
}

}  // namespace specdec::cpu

namespace specdec {

void exit_confidence_cpu(const ExitParams& params, int threads);

}  // namespace specdec

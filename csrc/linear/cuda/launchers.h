// The CUDA launchers of linear and rms_norm, as the bindings call them. They return errors, never synchronise and never
// exit.
#pragma once

#include "common/cuda/launch.h"
#include "linear/cuda/linear_launch.h"

namespace specdec {

cudaError_t linear_cuda(const LinearLaunch& launch, int device, cudaStream_t stream);
cudaError_t rms_norm_cuda(const RmsNormParams& params, int device, cudaStream_t stream);

// What a call needs, which its shapes decide.
CallScratch linear_scratch(const LinearLaunch& launch);

// What a launcher takes: see common/cuda/launch.h.
inline LinearLaunch launch_of(const LinearParams& params, const CallMemory& memory) {
  return with_memory<LinearLaunch>(params, memory);
}

}  // namespace specdec

// The CUDA launchers of early exit, as the bindings call them. They return errors, never synchronise and never exit.
#pragma once

#include "common/cuda/launch.h"
#include "early_exit/cuda/exit_launch.h"
#include "early_exit/cuda/mlp_launch.h"

namespace specdec {

cudaError_t exit_confidence_cuda(const ExitLaunch& launch, int device, cudaStream_t stream);
cudaError_t bounded_exit_cuda(const BoundedLaunch& launch, int device, cudaStream_t stream);
cudaError_t screened_exit_cuda(const ScreenLaunch& launch, int device, cudaStream_t stream);
cudaError_t exit_mlp_cuda(const MlpLaunch& launch, int device, cudaStream_t stream);

// What a call needs, which its shapes and its path decide.
CallScratch exit_confidence_scratch(const ExitLaunch& launch);
CallScratch bounded_exit_scratch(const BoundedLaunch& launch);
CallScratch screened_exit_scratch(const ScreenLaunch& launch);
CallScratch exit_mlp_scratch(const MlpLaunch& launch);

// What a launcher takes: see common/cuda/launch.h.
inline ExitLaunch launch_of(const ExitParams& params, const CallMemory& memory) {
  return with_multiprocessors<ExitLaunch>(params, memory);
}
inline ScreenLaunch launch_of(const ScreenedParams& params, const CallMemory& memory) {
  return with_multiprocessors<ScreenLaunch>(params, memory);
}
inline BoundedLaunch launch_of(const BoundedParams& params, const CallMemory& memory) {
  return with_multiprocessors<BoundedLaunch>(params, memory);
}
inline MlpLaunch launch_of(const MlpParams& params, const CallMemory& memory) {
  return with_memory<MlpLaunch>(params, memory);
}

}  // namespace specdec

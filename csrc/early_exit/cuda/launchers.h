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

// What a call needs, which its shapes decide.
CallScratch exit_confidence_scratch(const ExitLaunch& launch);
CallScratch bounded_exit_scratch(const BoundedLaunch& launch);
CallScratch screened_exit_scratch(const ScreenLaunch& launch);
CallScratch exit_mlp_scratch(const MlpLaunch& launch);

}  // namespace specdec

// The CUDA launchers of linear and rms_norm, as the bindings call them. They return errors, never synchronise and never
// exit.
#pragma once

#include "common/cuda/launch.h"
#include "linear/params.h"

namespace specdec {

cudaError_t linear_cuda(const LinearParams& params, int device, cudaStream_t stream);
cudaError_t rms_norm_cuda(const RmsNormParams& params, int device, cudaStream_t stream);

}  // namespace specdec

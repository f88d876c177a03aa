// The CUDA launcher of kv_propagate, as the bindings call it. It returns errors, never synchronises and never exits.
#pragma once

#include "common/cuda/launch.h"
#include "kv/params.h"

namespace specdec {

cudaError_t kv_propagate_cuda(const KvPropagateParams& params, int device, cudaStream_t stream);

}  // namespace specdec

// The CUDA launcher of build_topology, as the bindings call it. It returns errors, never synchronises and never exits.
#pragma once

#include "common/cuda/launch.h"
#include "topology/params.h"

namespace specdec {

cudaError_t build_topology_cuda(const BuildTopologyParams& params, int device, cudaStream_t stream);

}  // namespace specdec

// The CUDA launchers of the topology ops, as the bindings call them. They return errors, never synchronise and never
// exit.
#pragma once

#include "common/cuda/launch.h"
#include "topology/params.h"

namespace specdec {

cudaError_t build_topology_cuda(const BuildTopologyParams& params, int device, cudaStream_t stream);
cudaError_t grow_tree_cuda(const GrowTreeParams& params, int device, cudaStream_t stream);
cudaError_t prune_tree_cuda(const PruneTreeParams& params, int device, cudaStream_t stream);

}  // namespace specdec

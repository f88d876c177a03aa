// Launches prune_tree: one block for each request. Refuses trees that build_topology refuses.
#include "topology/cuda/prune_tree.cuh"

#include "topology/cuda/launchers.h"

namespace specdec {

using namespace cuda;

cudaError_t prune_tree_cuda(const PruneTreeParams& params, int device, cudaStream_t stream) {
  if (params.batch == 0) return cudaSuccess;
  if (params.nodes < 1 || params.nodes > kBuildTopologyMaxNodes) return cudaErrorInvalidValue;
  return launch(prune_tree_kernel, dim3(params.batch), dim3(kBestThreads), SharedTree::bytes(params.nodes), device,
                stream, params);
}

}  // namespace specdec

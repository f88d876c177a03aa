// Launches grow_tree: one block for each request.
#include "topology/cuda/grow_tree.cuh"

#include "topology/cuda/launchers.h"

namespace specdec {

using namespace cuda;

cudaError_t grow_tree_cuda(const GrowTreeParams& params, int device, cudaStream_t stream) {
  if (params.batch == 0) return cudaSuccess;
  if (params.width > kMaxGrowWidth || params.rows > kMaxGrowWidth) return cudaErrorInvalidValue;
  return launch(grow_tree_kernel, dim3(params.batch), dim3(kBestThreads), 0, device, stream, params);
}

}  // namespace specdec

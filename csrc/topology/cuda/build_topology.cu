// Instantiations of build_topology, and which one serves a tree: as many threads as nodes, as far as that goes.
#include "topology/cuda/build_topology.cuh"

#include "topology/cuda/launchers.h"

namespace specdec::cuda {

template cudaError_t build_topology<64>(const BuildTopologyParams&, int, cudaStream_t);
template cudaError_t build_topology<256>(const BuildTopologyParams&, int, cudaStream_t);

}  // namespace specdec::cuda

namespace specdec {

using namespace cuda;

cudaError_t build_topology_cuda(const BuildTopologyParams& params, int device, cudaStream_t stream) {
  if (params.nodes <= 64) return build_topology<64>(params, device, stream);
  return build_topology<256>(params, device, stream);
}

}  // namespace specdec

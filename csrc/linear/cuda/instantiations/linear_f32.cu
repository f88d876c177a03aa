#include "linear/cuda/linear.cuh"

namespace specdec::cuda {

template cudaError_t linear<float>(LinearLaunch&, int, cudaStream_t);

}  // namespace specdec::cuda

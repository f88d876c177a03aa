#include "linear/cuda/linear.cuh"

namespace specdec::cuda {

template cudaError_t linear<Float16>(LinearLaunch&, int, cudaStream_t);

}  // namespace specdec::cuda

#include "early_exit/cuda/exit_confidence.cuh"

namespace specdec::cuda {

template cudaError_t exit_confidence_of<float, 1>(const ExitLaunch&, int, cudaStream_t);

}  // namespace specdec::cuda

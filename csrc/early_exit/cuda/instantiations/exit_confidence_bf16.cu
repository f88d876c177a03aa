#include "early_exit/cuda/exit_confidence.cuh"

namespace specdec::cuda {

template cudaError_t exit_confidence_of<BFloat16, 1>(const ExitLaunch&, int, cudaStream_t);

}  // namespace specdec::cuda

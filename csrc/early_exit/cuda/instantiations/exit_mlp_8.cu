#include "early_exit/cuda/exit_mlp.cuh"

namespace specdec::cuda {

template cudaError_t launch_exit_mlp<8>(const MlpLaunch&, int32_t, int, cudaStream_t);

}  // namespace specdec::cuda

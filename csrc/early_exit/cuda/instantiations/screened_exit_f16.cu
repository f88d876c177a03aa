#include "early_exit/cuda/screened_exit.cuh"

namespace specdec::cuda {

template cudaError_t screen_of<Float16>(const ScreenLaunch&, int, cudaStream_t);

}  // namespace specdec::cuda

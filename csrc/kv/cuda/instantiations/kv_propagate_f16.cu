#include "kv/cuda/kv_propagate.cuh"

namespace specdec::cuda {

template cudaError_t kv_propagate<Float16>(KvLaunch&, int, cudaStream_t);

}  // namespace specdec::cuda

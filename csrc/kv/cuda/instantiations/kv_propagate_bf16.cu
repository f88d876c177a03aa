#include "kv/cuda/kv_propagate.cuh"

namespace specdec::cuda {

template cudaError_t kv_propagate<BFloat16>(KvLaunch&, int, cudaStream_t);

}  // namespace specdec::cuda

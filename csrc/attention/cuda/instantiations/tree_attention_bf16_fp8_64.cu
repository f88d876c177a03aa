#include "attention/cuda/tree_attention_kernel.cuh"

namespace specdec::cuda {

template cudaError_t tree_attention<BFloat16, Float8, 64>(const TreeAttentionParams&, int, cudaStream_t);

}  // namespace specdec::cuda

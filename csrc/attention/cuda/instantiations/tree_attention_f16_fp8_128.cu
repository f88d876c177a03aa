#include "attention/cuda/tree_attention_kernel.cuh"

namespace specdec::cuda {

template cudaError_t tree_attention<Float16, Float8, 128>(const TreeAttentionParams&, int, cudaStream_t);

}  // namespace specdec::cuda

// Instantiations of merge_states: for each dtype, rows in packs of 16 bytes, and rows that allow single elements only.
#include "attention/cuda/merge_states.cuh"

#include "attention/cuda/launchers.h"

namespace specdec::cuda {

template cudaError_t merge_states<float, 4>(const MergeStatesParams&, int, cudaStream_t);
template cudaError_t merge_states<float, 1>(const MergeStatesParams&, int, cudaStream_t);
template cudaError_t merge_states<BFloat16, 8>(const MergeStatesParams&, int, cudaStream_t);
template cudaError_t merge_states<BFloat16, 1>(const MergeStatesParams&, int, cudaStream_t);
template cudaError_t merge_states<Float16, 8>(const MergeStatesParams&, int, cudaStream_t);
template cudaError_t merge_states<Float16, 1>(const MergeStatesParams&, int, cudaStream_t);

namespace {

template <class T>
cudaError_t merge(const MergeStatesParams& params, int device, cudaStream_t stream) {
  if (merges_in_packs<T>(params)) return merge_states<T, 16 / sizeof(T)>(params, device, stream);
  return merge_states<T, 1>(params, device, stream);
}

}  // namespace

}  // namespace specdec::cuda

namespace specdec {

using namespace cuda;

cudaError_t merge_states_cuda(const MergeStatesParams& params, int device, cudaStream_t stream) {
  switch (params.dtype) {
    case DType::kFloat32:
      return merge<float>(params, device, stream);
    case DType::kBFloat16:
      return merge<BFloat16>(params, device, stream);
    case DType::kFloat16:
      return merge<Float16>(params, device, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace specdec

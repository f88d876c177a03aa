// Picks rms_norm's instantiation by dtype.
#include "linear/cuda/rms_norm.cuh"

#include "linear/cuda/launchers.h"

namespace specdec {

using namespace cuda;

cudaError_t rms_norm_cuda(const RmsNormParams& params, int device, cudaStream_t stream) {
  if (params.rows == 0) return cudaSuccess;
  switch (params.dtype) {
    case DType::kFloat32:
      return rms_norm<float>(params, device, stream);
    case DType::kBFloat16:
      return rms_norm<BFloat16>(params, device, stream);
    case DType::kFloat16:
      return rms_norm<Float16>(params, device, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace specdec

// Picks linear's instantiation, one dtype of x to a file: linear_*.cu.
#include "linear/cuda/linear.cuh"

#include "linear/cuda/launchers.h"

namespace specdec::cuda {

extern template cudaError_t linear<float>(LinearLaunch&, int, cudaStream_t);
extern template cudaError_t linear<BFloat16>(LinearLaunch&, int, cudaStream_t);
extern template cudaError_t linear<Float16>(LinearLaunch&, int, cudaStream_t);

}  // namespace specdec::cuda

namespace specdec {

using namespace cuda;

CallScratch linear_scratch(const LinearLaunch& arguments) {
  LinearLaunch launch = arguments;
  lay_out(launch);
  if (launch.splits == 1) return {};
  const int64_t results = int64_t(launch.row_blocks) * linear_output_blocks(launch.call);
  const int64_t floats = results * launch.splits * kLinearChannels * launch.row_block;
  return {floats * int64_t(sizeof(float)), results};
}

cudaError_t linear_cuda(const LinearLaunch& arguments, int device, cudaStream_t stream) {
  const LinearParams& p = arguments.call;
  if (p.rows == 0 || p.outputs == 0) return cudaSuccess;
  LinearLaunch launch = arguments;
  lay_out(launch);
  launch.row_bytes = weight_row_bytes(p.weight_type, p.dim);
  launch.block_bytes = int32_t(weight_row_bytes(p.weight_type, kBlockElements));
  const uintptr_t weight = reinterpret_cast<uintptr_t>(p.weight) | uintptr_t(launch.row_bytes);
  launch.unit = weight % 16 == 0 ? 16 : weight % 4 == 0 ? 4 : 1;
  const int64_t size = element_bytes(p.dtype);
  const uintptr_t x = reinterpret_cast<uintptr_t>(p.x) | uintptr_t(p.x_stride_row * size) | uintptr_t(p.dim * size);
  launch.x_aligned = x % 16 == 0;
  switch (p.dtype) {
    case DType::kFloat32:
      return linear<float>(launch, device, stream);
    case DType::kBFloat16:
      return linear<BFloat16>(launch, device, stream);
    case DType::kFloat16:
      return linear<Float16>(launch, device, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace specdec

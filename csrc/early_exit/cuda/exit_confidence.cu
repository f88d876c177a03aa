// Picks exit_confidence's instantiation: the type of a head to a file, exit_confidence_*.cu.
#include "early_exit/cuda/exit_confidence.cuh"
#include "early_exit/cuda/launchers.h"

namespace specdec::cuda {

extern template cudaError_t exit_confidence_of<BFloat16, 1>(const ExitLaunch&, int, cudaStream_t);
extern template cudaError_t exit_confidence_of<Float16, 1>(const ExitLaunch&, int, cudaStream_t);
extern template cudaError_t exit_confidence_of<float, 1>(const ExitLaunch&, int, cudaStream_t);
extern template cudaError_t exit_confidence_of<int8_t, 2>(const ExitLaunch&, int, cudaStream_t);
extern template cudaError_t exit_confidence_of<int8_t, 1>(const ExitLaunch&, int, cudaStream_t);

namespace {

constexpr int32_t kFewestRows = 8;  // of a block, as exit_confidence.cuh has them

CallScratch lay_out(ExitLaunch& launch) {
  const ExitParams& p = launch.call;
  launch.blocks = exit_blocks(p.vocab, launch.multiprocessors);
  launch.slots = launch.part.slots > 0 ? launch.part.slots : launch.blocks;
  const int64_t states = int64_t(p.rows) * launch.slots;
  launch.keys = states * 4 * int64_t(sizeof(float));
  return {launch.keys + states * top_k_of(p) * int64_t(sizeof(uint64_t)), p.rows / kFewestRows + 2};
}

}  // namespace

}  // namespace specdec::cuda

namespace specdec {

using namespace cuda;

CallScratch exit_confidence_scratch(const ExitLaunch& arguments) {
  ExitLaunch launch = arguments;
  return lay_out(launch);
}

cudaError_t exit_confidence_cuda(const ExitLaunch& arguments, int device, cudaStream_t stream) {
  ExitLaunch launch = arguments;
  const ExitParams& p = launch.call;
  if (p.rows == 0) return cudaSuccess;
  if (p.dim > kExitMaxDims) return cudaErrorInvalidValue;
  lay_out(launch);
  launch.head_aligned = is_aligned(p.head, p.dim * element_bytes(p.head_type));
  launch.hidden_aligned = is_aligned(p.hidden, p.hidden_stride_row * element_bytes(p.hidden_dtype));
  launch.norm_aligned = is_aligned(p.norm_weight, 0);
  switch (p.head_type) {
    case HeadType::kFloat32:
      return exit_confidence_of<float, 1>(launch, device, stream);
    case HeadType::kBFloat16:
      return exit_confidence_of<BFloat16, 1>(launch, device, stream);
    case HeadType::kFloat16:
      return exit_confidence_of<Float16, 1>(launch, device, stream);
    default:
      if (p.hidden_dtype == DType::kFloat32) return exit_confidence_of<int8_t, 2>(launch, device, stream);
      return exit_confidence_of<int8_t, 1>(launch, device, stream);
  }
}

}  // namespace specdec

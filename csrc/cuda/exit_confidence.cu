// Picks exit_confidence's instantiation: the type of a head to a file, exit_confidence_*.cu.
#include "cuda/launchers.h"
#include "specdec/exit_confidence.cuh"

namespace specdec {

extern template cudaError_t exit_confidence_of<BFloat16>(const ExitLaunch&, int, cudaStream_t);
extern template cudaError_t exit_confidence_of<Float16>(const ExitLaunch&, int, cudaStream_t);
extern template cudaError_t exit_confidence_of<float>(const ExitLaunch&, int, cudaStream_t);
extern template cudaError_t exit_confidence_of<int8_t>(const ExitLaunch&, int, cudaStream_t);

namespace {

constexpr int32_t kTile = 128, kBlocksPerMultiprocessor = 2, kFewestRows = 8;  // as exit_confidence.cuh has them
constexpr int32_t kMostDims = 1 << 28;  // so that bytes of a row fit into 32 bits

CallScratch lay_out(ExitLaunch& launch) {
  const ExitParams& p = launch.call;
  const int32_t tiles = p.vocab / kTile + (p.vocab % kTile != 0);
  launch.blocks = min(tiles, kBlocksPerMultiprocessor * launch.multiprocessors);
  launch.slots = launch.part.slots > 0 ? launch.part.slots : launch.blocks;
  const int64_t states = int64_t(p.rows) * launch.slots;
  launch.keys = states * 4 * int64_t(sizeof(float));
  return {launch.keys + states * listed_of(p) * int64_t(sizeof(uint64_t)), p.rows / kFewestRows + 2};
}

}  // namespace

CallScratch exit_confidence_scratch(const ExitLaunch& arguments) {
  ExitLaunch launch = arguments;
  return lay_out(launch);
}

cudaError_t exit_confidence_cuda(const ExitLaunch& arguments, int device, cudaStream_t stream) {
  ExitLaunch launch = arguments;
  const ExitParams& p = launch.call;
  if (p.rows == 0) return cudaSuccess;
  if (p.dim > kMostDims) return cudaErrorInvalidValue;
  lay_out(launch);
  const int64_t head_size = p.head_type == HeadType::kFloat32 ? 4 : p.head_type == HeadType::kInt8 ? 1 : 2;
  launch.head_aligned = is_aligned(p.head, p.dim * head_size);
  launch.hidden_aligned = is_aligned(p.hidden, p.hidden_stride_row * (p.hidden_dtype == DType::kFloat32 ? 4 : 2));
  launch.norm_aligned = is_aligned(p.norm_weight, 0);
  switch (p.head_type) {
    case HeadType::kFloat32:
      return exit_confidence_of<float>(launch, device, stream);
    case HeadType::kBFloat16:
      return exit_confidence_of<BFloat16>(launch, device, stream);
    case HeadType::kFloat16:
      return exit_confidence_of<Float16>(launch, device, stream);
    default:
      return exit_confidence_of<int8_t>(launch, device, stream);
  }
}

}  // namespace specdec

// The three launches of the screened form: two of screened_exit_*.cu, and the whole head for the rows that are left.
#include "early_exit/cuda/screened_exit.cuh"

#include "early_exit/cuda/launchers.h"

namespace specdec::cuda {

extern template cudaError_t screen_of<BFloat16>(const ScreenLaunch&, int, cudaStream_t);
extern template cudaError_t screen_of<Float16>(const ScreenLaunch&, int, cudaStream_t);
extern template cudaError_t screen_of<float>(const ScreenLaunch&, int, cudaStream_t);

namespace {

// The whole head's launch, which shares the first part of the scratch and the first counters.
ExitLaunch whole_head(const ScreenLaunch& launch) {
  ExitLaunch whole{};
  whole.call = launch.call.exit;
  whole.scratch = launch.scratch;
  whole.counters = launch.counters;
  whole.multiprocessors = launch.multiprocessors;
  whole.row_list = reinterpret_cast<const int32_t*>(launch.scratch + launch.fallen);
  whole.rechecked = launch.call.rechecked;
  return whole;
}

CallScratch lay_out(ScreenLaunch& launch) {
  const ExitParams& p = launch.call.exit;
  const CallScratch shared = exit_confidence_scratch(whole_head(launch));
  launch.blocks = exit_blocks(p.vocab, launch.multiprocessors);
  launch.spans = p.vocab / kSpan + (p.vocab % kSpan != 0);
  launch.stride = (int64_t(p.vocab) + 3) / 4 * 4;
  launch.first_counter = int32_t(shared.counters);
  const int64_t rows = p.rows, parts = rows * launch.spans;
  ScratchLayout scratch;
  scratch.take<uint8_t>(shared.bytes);
  launch.keys = rows * launch.blocks * 4 * int64_t(sizeof(float));
  launch.approximate = scratch.take<float>(rows * launch.stride);
  launch.counts = scratch.take<int32_t>(rows * launch.blocks * (kSteps + 1));
  launch.plans = scratch.take<ScreenPlan>(rows);
  launch.known = scratch.take<float>(parts * 4);
  launch.known_keys = scratch.take<uint64_t>(parts * top_k_of(p));
  launch.tails = scratch.take<SpanTail>(parts);
  launch.fallen = scratch.take<int32_t>(rows + 1);
  return {scratch.bytes(), shared.counters + rows + 1};
}

}  // namespace

}  // namespace specdec::cuda

namespace specdec {

using namespace cuda;

CallScratch screened_exit_scratch(const ScreenLaunch& arguments) {
  ScreenLaunch launch = arguments;
  return lay_out(launch);
}

cudaError_t screened_exit_cuda(const ScreenLaunch& arguments, int device, cudaStream_t stream) {
  ScreenLaunch launch = arguments;
  const ExitParams& p = launch.call.exit;
  if (p.rows == 0) return cudaSuccess;
  if (p.dim > kExitMaxDims || p.head_type == HeadType::kInt8) return cudaErrorInvalidValue;
  lay_out(launch);
  launch.head_aligned = is_aligned(p.head, p.dim * element_bytes(p.head_type));
  launch.hidden_aligned = is_aligned(p.hidden, p.hidden_stride_row * element_bytes(p.hidden_dtype));
  launch.norm_aligned = is_aligned(p.norm_weight, 0);
  launch.values_aligned = is_aligned(launch.call.values, p.dim);
  const cudaError_t error = p.head_type == HeadType::kFloat32    ? screen_of<float>(launch, device, stream)
                            : p.head_type == HeadType::kBFloat16 ? screen_of<BFloat16>(launch, device, stream)
                                                                 : screen_of<Float16>(launch, device, stream);
  return error != cudaSuccess ? error : exit_confidence_cuda(whole_head(launch), device, stream);
}

}  // namespace specdec

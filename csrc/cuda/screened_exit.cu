// The three launches of the screened form: two of screened_exit_*.cu, and the whole head for the rows that are left.
#include "specdec/screened_exit.cuh"

#include "cuda/launchers.h"

namespace specdec {

extern template cudaError_t screen_of<BFloat16>(const ScreenLaunch&, int, cudaStream_t);
extern template cudaError_t screen_of<Float16>(const ScreenLaunch&, int, cudaStream_t);
extern template cudaError_t screen_of<float>(const ScreenLaunch&, int, cudaStream_t);

namespace {

constexpr int32_t kTile = 128, kBlocksPerMultiprocessor = 2;  // as exit_confidence.cu has them
constexpr int32_t kMostDims = 1 << 28;

// The whole head's launch, which shares the first part of the scratch and the first counters.
ExitLaunch whole_head(const ScreenLaunch& launch) {
  ExitLaunch whole{};
  whole.call = launch.call.exit;
  whole.scratch = launch.scratch;
  whole.counters = launch.counters;
  whole.multiprocessors = launch.multiprocessors;
  whole.listed_rows = reinterpret_cast<const int32_t*>(launch.scratch + launch.fallen);
  whole.rechecked = launch.call.rechecked;
  return whole;
}

CallScratch lay_out(ScreenLaunch& launch) {
  const ExitParams& p = launch.call.exit;
  const CallScratch shared = exit_confidence_scratch(whole_head(launch));
  const int32_t tiles = p.vocab / kTile + (p.vocab % kTile != 0);
  launch.blocks = min(tiles, kBlocksPerMultiprocessor * launch.multiprocessors);
  launch.spans = p.vocab / kSpan + (p.vocab % kSpan != 0);
  launch.stride = (int64_t(p.vocab) + 3) / 4 * 4;
  launch.first_counter = int32_t(shared.counters);
  int64_t end = 0;
  const auto take = [&end](int64_t bytes) {
    const int64_t begin = end;
    end += (bytes + 15) / 16 * 16;
    return begin;
  };
  const int64_t rows = p.rows, parts = rows * launch.spans, key = listed_of(p) * int64_t(sizeof(uint64_t));
  take(shared.bytes);
  launch.keys = rows * launch.blocks * 4 * int64_t(sizeof(float));
  launch.approximate = take(rows * launch.stride * int64_t(sizeof(float)));
  launch.counts = take(rows * launch.blocks * (kSteps + 1) * int64_t(sizeof(int32_t)));
  launch.plans = take(rows * int64_t(sizeof(ScreenPlan)));
  launch.known = take(parts * 4 * int64_t(sizeof(float)));
  launch.known_keys = take(parts * key);
  launch.tails = take(parts * int64_t(sizeof(SpanTail)));
  launch.fallen = take((rows + 1) * int64_t(sizeof(int32_t)));
  return {end, shared.counters + rows + 1};
}

}  // namespace

CallScratch screened_exit_scratch(const ScreenLaunch& arguments) {
  ScreenLaunch launch = arguments;
  return lay_out(launch);
}

cudaError_t screened_exit_cuda(const ScreenLaunch& arguments, int device, cudaStream_t stream) {
  ScreenLaunch launch = arguments;
  const ExitParams& p = launch.call.exit;
  if (p.rows == 0) return cudaSuccess;
  if (p.dim > kMostDims || p.head_type == HeadType::kInt8) return cudaErrorInvalidValue;
  lay_out(launch);
  launch.head_aligned = is_aligned(p.head, int64_t(p.dim) * (p.head_type == HeadType::kFloat32 ? 4 : 2));
  launch.hidden_aligned = is_aligned(p.hidden, p.hidden_stride_row * (p.hidden_dtype == DType::kFloat32 ? 4 : 2));
  launch.norm_aligned = is_aligned(p.norm_weight, 0);
  launch.values_aligned = is_aligned(launch.call.values, p.dim);
  const cudaError_t error = p.head_type == HeadType::kFloat32    ? screen_of<float>(launch, device, stream)
                            : p.head_type == HeadType::kBFloat16 ? screen_of<BFloat16>(launch, device, stream)
                                                                 : screen_of<Float16>(launch, device, stream);
  return error != cudaSuccess ? error : exit_confidence_cuda(whole_head(launch), device, stream);
}

}  // namespace specdec

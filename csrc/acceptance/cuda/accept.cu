// The launcher of acceptance, and which path serves a call.
//
// Eager where the rows of all requests are few, and long enough that reading one with a single block costs more than
// two launches: at most kEagerRows nodes in the batch and a vocabulary of kEagerVocab or more. The lazy path reads one
// row after the other at what one block can read: 352 threads with two chunks of 16 bytes under way, 11 KiB in about
// 800 ns, 14 GB/s; four rows or more, for a walk that ends at its first node reads the target's, the draft's, and both
// again for the draw. The eager one reads all rows at what the GPU can read, 3,400 GB/s on an H200: of each node the
// target's, and the draft's of those with children, about every second. So it takes less time up to
// 4 / 1.5 * 3400 / 14 = 650 nodes, and in longer walks beyond that. (Derived, not measured.) Only shapes decide, never
// values, so a captured graph stays right. Target ids instead of logits are always walked lazily: there are no rows.
#include "acceptance/cuda/accept.cuh"
#include "acceptance/cuda/accept_eager.cuh"
#include "acceptance/cuda/launchers.h"

namespace specdec::cuda {

namespace {

constexpr int64_t kEagerRows = 512;
constexpr int32_t kEagerVocab = 16384;
constexpr int64_t kMaxBlocks = 0x7fffffff;

bool takes_eager_path(const AcceptLaunch& launch) {
  if (launch.call.target_is_ids || launch.launch_path == AcceptPath::kLazy) return false;
  if (launch.launch_path == AcceptPath::kEager) return true;
  return int64_t(launch.call.batch) * launch.call.nodes <= kEagerRows && launch.call.vocab >= kEagerVocab;
}

bool is_too_large(const AcceptParams& p) {
  return !p.target_is_ids && (p.vocab > kAcceptMaxVocab || p.draft_vocab > kAcceptMaxVocab);
}

}  // namespace

}  // namespace specdec::cuda

namespace specdec {

using namespace cuda;

CallScratch accept_scratch(const AcceptLaunch& arguments) {
  AcceptLaunch launch = arguments;
  return lay_out(launch, takes_eager_path(launch));
}

cudaError_t accept_cuda(const AcceptLaunch& arguments, int device, cudaStream_t stream) {
  AcceptLaunch launch = arguments;
  const AcceptParams& p = launch.call;
  if (p.batch == 0) return cudaSuccess;
  if (is_too_large(p)) return cudaErrorInvalidValue;
  const bool eager = takes_eager_path(launch);
  lay_out(launch, eager);
  const size_t reduce_bytes = SharedMemory::bytes<uint32_t>(TeamReducer::kWords);
  const int64_t row_blocks = int64_t(p.batch) * table_rows(p) * launch.spans;
  if (row_blocks > kMaxBlocks) return cudaErrorInvalidValue;
  const dim3 span_threads(team_threads(min(p.vocab, kEagerSpan)));
  if (eager) {
    const cudaError_t error = cuda::launch(accept_distributions_kernel, dim3(unsigned(row_blocks)), span_threads,
                                           reduce_bytes + CutScratch::bytes(), device, stream, launch);
    if (error != cudaSuccess) return error;
  }
  const dim3 walk_threads(p.target_is_ids ? kWarpSize : min(kWarpSize + team_threads(p.vocab), kWalkMaxThreads));
  const cudaError_t error =
      cuda::launch(accept_walk_kernel, dim3(p.batch), walk_threads, WalkShared::bytes(p), device, stream, launch);
  if (error != cudaSuccess || !eager) return error;
  return cuda::launch(accept_draw_kernel, dim3(unsigned(p.batch * launch.spans)), span_threads, reduce_bytes, device,
                      stream, launch);
}

}  // namespace specdec

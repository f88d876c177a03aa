// The launches of early exit with bounds: one that measures, then exit_confidence's for each part of the head.
#include "early_exit/cuda/bounded_exit.cuh"

#include "early_exit/cuda/launchers.h"

namespace specdec::cuda {
namespace {

CallScratch lay_out(BoundedLaunch& launch) {
  const ExitParams& p = launch.call.exit;
  launch.slots = exit_blocks(p.vocab, launch.multiprocessors) + 1;
  ExitLaunch whole{};
  whole.call = p;
  whole.multiprocessors = launch.multiprocessors;
  whole.part.slots = launch.slots;
  const CallScratch shared = exit_confidence_scratch(whole);
  ScratchLayout scratch;
  scratch.take<uint8_t>(shared.bytes);
  launch.keys = int64_t(p.rows) * launch.slots * 4 * int64_t(sizeof(float));
  launch.reach = scratch.take<RowReach>(p.rows);
  launch.biases = scratch.take<float>((kMaxParts - 1) * kBiasBlocks);
  launch.lists = scratch.take<int32_t>(2 * (int64_t(p.rows) + 1));
  return {scratch.bytes(), shared.counters};
}

cudaError_t measure(const BoundedLaunch& launch, int device, cudaStream_t stream) {
  const ExitParams& p = launch.call.exit;
  const int64_t blocks = p.rows + (p.bias != nullptr ? int64_t(launch.call.parts - 1) * kBiasBlocks : 0);
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return cuda::launch(measure_exit_kernel, dim3(unsigned(blocks)), dim3(kMeasureThreads), 0, device, stream, launch);
}

// Lists take turns: a part reads the one that the part before has written.
int32_t* list_of(const BoundedLaunch& launch, int32_t part) {
  auto* lists = reinterpret_cast<int32_t*>(launch.scratch + launch.lists);
  return lists + part % 2 * (int64_t(launch.call.exit.rows) + 1);
}

ExitLaunch part_of(const BoundedLaunch& launch, int32_t part) {
  const BoundedParams& b = launch.call;
  const int32_t begin = part == 0 ? 0 : b.ends[part - 1];
  ExitLaunch of{};
  of.call = b.exit;
  of.call.head = static_cast<const uint8_t*>(b.exit.head) + begin * element_bytes(b.exit.head_type) * b.exit.dim;
  if (b.exit.scales != nullptr) of.call.scales += begin;
  if (b.exit.bias != nullptr) of.call.bias += begin;
  of.call.vocab = b.ends[part] - begin;
  of.scratch = launch.scratch;
  of.counters = launch.counters;
  of.multiprocessors = launch.multiprocessors;
  of.part.slots = launch.slots;
  if (part > 0) of.row_list = list_of(launch, part);
  of.part.seen = b.seen;
  of.part.begin = begin;
  of.part.left = b.exit.vocab - b.ends[part];
  if (part + 1 == b.parts) return of;
  of.part.reach = reinterpret_cast<const double*>(launch.scratch + launch.reach);
  if (b.exit.bias != nullptr) {
    of.part.biases = reinterpret_cast<const float*>(launch.scratch + launch.biases) + part * kBiasBlocks;
    of.part.bias_count = (b.parts - 1 - part) * kBiasBlocks;
  }
  of.part.norm_after = b.norms_after + part;
  of.part.open = list_of(launch, part + 1);
  return of;
}

}  // namespace

}  // namespace specdec::cuda

namespace specdec {

using namespace cuda;

CallScratch bounded_exit_scratch(const BoundedLaunch& arguments) {
  BoundedLaunch launch = arguments;
  return lay_out(launch);
}

cudaError_t bounded_exit_cuda(const BoundedLaunch& arguments, int device, cudaStream_t stream) {
  BoundedLaunch launch = arguments;
  const ExitParams& p = launch.call.exit;
  if (p.rows == 0) return cudaSuccess;
  if (p.dim > kExitMaxDims) return cudaErrorInvalidValue;
  lay_out(launch);
  launch.hidden_aligned = is_aligned(p.hidden, p.hidden_stride_row * element_bytes(p.hidden_dtype));
  launch.norm_aligned = is_aligned(p.norm_weight, 0);
  cudaError_t error = measure(launch, device, stream);
  for (int32_t part = 0; part < launch.call.parts && error == cudaSuccess; ++part) {
    error = exit_confidence_cuda(part_of(launch, part), device, stream);
  }
  return error;
}

}  // namespace specdec

// The launcher of sampling.
#include "acceptance/cuda/sample.cuh"

#include "acceptance/cuda/launchers.h"

namespace specdec::cuda {

namespace {

CallScratch lay_out(SampleLaunch& launch) {
  const SampleParams& p = launch.call;
  launch.spans = (p.vocab + kSampleSpan - 1) / kSampleSpan;
  const int64_t rows = int64_t(p.batch) * p.rows;
  launch.keys = rows * launch.spans * int64_t(sizeof(DistributionPart));
  launch.drawn = launch.keys + rows * launch.spans * p.count * int64_t(sizeof(uint64_t));
  launch.statuses = launch.drawn + rows * p.count * int64_t(sizeof(int32_t));
  return {launch.statuses + rows * int64_t(sizeof(int32_t)), rows + p.batch};
}

}  // namespace

}  // namespace specdec::cuda

namespace specdec {

using namespace cuda;

CallScratch sample_scratch(const SampleLaunch& arguments) {
  SampleLaunch launch = arguments;
  return lay_out(launch);
}

cudaError_t sample_cuda(const SampleLaunch& arguments, int device, cudaStream_t stream) {
  SampleLaunch launch = arguments;
  const SampleParams& p = launch.call;
  const int64_t rows = int64_t(p.batch) * p.rows;
  lay_out(launch);
  if (p.batch == 0) return cudaSuccess;
  if (p.vocab > kSampleMaxVocab || rows * launch.spans > 0x7fffffff) return cudaErrorInvalidValue;
  const size_t shared_bytes = SharedMemory::bytes<uint32_t>(TeamReducer::kWords) + CutScratch::bytes();
  return cuda::launch(sample_kernel, dim3(unsigned(rows > 0 ? rows * launch.spans : p.batch)),
                      dim3(team_threads(min(p.vocab, kSampleSpan))), shared_bytes, device, stream, launch);
}

}  // namespace specdec

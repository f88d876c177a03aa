// The CUDA launchers of acceptance and sampling, as the bindings call them. They return errors, never synchronise and never exit.
#pragma once

#include "acceptance/cuda/accept_launch.h"
#include "common/cuda/launch.h"

namespace specdec {

// 48 KiB of shared memory for the bits of a vocabulary: with all else it is what every GPU grants a block.
constexpr int32_t kAcceptMaxVocab = 393216, kSampleMaxVocab = 1 << 20;

cudaError_t accept_cuda(const AcceptLaunch& launch, int device, cudaStream_t stream);
cudaError_t sample_cuda(const SampleLaunch& launch, int device, cudaStream_t stream);

// What a call needs, which its shapes and its path decide.
CallScratch accept_scratch(const AcceptLaunch& launch);
CallScratch sample_scratch(const SampleLaunch& launch);

// What a launcher takes: see common/cuda/launch.h.
inline AcceptLaunch launch_of(const AcceptParams& params, const CallMemory& memory) {
  AcceptLaunch launch = with_memory<AcceptLaunch>(params, memory);
  launch.launch_path = static_cast<AcceptPath>(memory.path);
  return launch;
}
inline SampleLaunch launch_of(const SampleParams& params, const CallMemory& memory) {
  return with_memory<SampleLaunch>(params, memory);
}

}  // namespace specdec

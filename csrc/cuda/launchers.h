// The CUDA launchers, as the bindings call them. They return errors, never synchronise and never exit.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "specdec/accept_launch.h"
#include "specdec/exit_launch.h"
#include "specdec/kv_params.h"
#include "specdec/mlp_launch.h"
#include "specdec/params.h"

namespace specdec {

cudaError_t build_topology_cuda(const BuildTopologyParams& params, int device, cudaStream_t stream);
cudaError_t merge_states_cuda(const MergeStatesParams& params, int device, cudaStream_t stream);
cudaError_t tree_attention_cuda(const TreeAttentionParams& params, int device, cudaStream_t stream);

// What a tree_attention call needs of the caller: float32 numbers of scratch, and int32 counters that are zero.
struct TreeAttentionScratch {
  int64_t floats, counters;
};
TreeAttentionScratch tree_attention_scratch(const TreeAttentionParams& params);

// 48 KiB of shared memory for the bits of a vocabulary: with all else it is what every GPU grants a block.
constexpr int32_t kAcceptMaxVocab = 393216, kSampleMaxVocab = 1 << 20;

cudaError_t accept_cuda(const AcceptLaunch& launch, int device, cudaStream_t stream);
cudaError_t sample_cuda(const SampleLaunch& launch, int device, cudaStream_t stream);
cudaError_t exit_confidence_cuda(const ExitLaunch& launch, int device, cudaStream_t stream);
cudaError_t bounded_exit_cuda(const BoundedLaunch& launch, int device, cudaStream_t stream);
cudaError_t screened_exit_cuda(const ScreenLaunch& launch, int device, cudaStream_t stream);
cudaError_t exit_mlp_cuda(const MlpLaunch& launch, int device, cudaStream_t stream);
cudaError_t kv_propagate_cuda(const KvPropagateParams& params, int device, cudaStream_t stream);

// What a call needs, which its shapes and its path decide.
CallScratch accept_scratch(const AcceptLaunch& launch);
CallScratch sample_scratch(const SampleLaunch& launch);
CallScratch exit_confidence_scratch(const ExitLaunch& launch);
CallScratch bounded_exit_scratch(const BoundedLaunch& launch);
CallScratch screened_exit_scratch(const ScreenLaunch& launch);
CallScratch exit_mlp_scratch(const MlpLaunch& launch);

// Lays out a call's scratch: parts one after the other, each at a multiple of 16 bytes.
class ScratchLayout {
 public:
  // Where the next part begins, of `count` things.
  template <class T>
  int64_t take(int64_t count) {
    const int64_t begin = end_;
    end_ += (count * int64_t(sizeof(T)) + 15) / 16 * 16;
    return begin;
  }
  int64_t bytes() const { return end_; }

 private:
  int64_t end_ = 0;
};

// One helpful sentence for an error of a launch on this device.
std::string explain(cudaError_t error, int device);

// Why this device can't run the compiled kernels (no driver, no such device, not built for its architecture), or "".
std::string cuda_device_error(int device);

}  // namespace specdec

// The CUDA launchers of tree_attention and merge_states, as the bindings call them. They return errors, never synchronise and never exit.
#pragma once

#include "attention/params.h"
#include "common/cuda/launch.h"

namespace specdec {

cudaError_t merge_states_cuda(const MergeStatesParams& params, int device, cudaStream_t stream);
cudaError_t tree_attention_cuda(const TreeAttentionParams& params, int device, cudaStream_t stream);

// What a call needs, which its shapes and its path decide.
CallScratch tree_attention_scratch(const TreeAttentionParams& params);

// What a launcher takes: see common/cuda/launch.h.
inline TreeAttentionParams launch_of(const TreeAttentionParams& params, const CallMemory& memory) {
  TreeAttentionParams launch = params;
  launch.scratch = reinterpret_cast<float*>(memory.scratch);
  launch.counters = memory.counters;
  return launch;
}

}  // namespace specdec

// The CUDA launchers of tree_attention and merge_states, as the bindings call them. They return errors, never synchronise and never exit.
#pragma once

#include "attention/params.h"
#include "common/cuda/launch.h"

namespace specdec {

cudaError_t merge_states_cuda(const MergeStatesParams& params, int device, cudaStream_t stream);
cudaError_t tree_attention_cuda(const TreeAttentionParams& params, int device, cudaStream_t stream);

// What a tree_attention call needs of the caller: float32 numbers of scratch, and int32 counters that are zero.
struct TreeAttentionScratch {
  int64_t floats, counters;
};
TreeAttentionScratch tree_attention_scratch(const TreeAttentionParams& params);

}  // namespace specdec

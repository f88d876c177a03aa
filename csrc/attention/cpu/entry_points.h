// The CPU kernels of tree_attention and merge_states, as the bindings call them. Each throws std::invalid_argument on
// values that only the kernel can see (a context length beyond the cache, a page out of range), naming the argument and
// the request.
#pragma once

#include <cstdint>

#include "attention/params.h"

namespace specdec {

void merge_states_cpu(const MergeStatesParams& params, int threads);
void tree_attention_cpu(const TreeAttentionParams& params, int threads);

// The exponential inside the attention kernels, for the tests. count is a multiple of 16; `weights`: the shorter one
// whose results are rounded to bfloat16.
void exp2_cpu(const float* x, float* y, int64_t count, bool weights);

}  // namespace specdec

// The CPU kernels, as the bindings call them. Each throws std::invalid_argument on values that only the kernel can see
// (a context length beyond the cache, a page out of range), naming the argument and the request.
#pragma once

#include <string>

#include "specdec/kv_params.h"
#include "specdec/params.h"

namespace specdec {

// "amx", "avx512_bf16", "avx512", "avx2" or "generic": the best that this processor and SPECDEC_OPS_CPU_ISA allow.
std::string cpu_isa();

// Limits the instruction set from now on ("" removes the limit). For tests and benchmarks; not thread-safe.
void set_cpu_isa(const std::string& name);

void build_topology_cpu(const BuildTopologyParams& params, int threads);
void kv_propagate_cpu(const KvPropagateParams& params, int threads);
void merge_states_cpu(const MergeStatesParams& params, int threads);
void tree_attention_cpu(const TreeAttentionParams& params, int threads);

// The exponential inside the attention kernels, for the tests. count is a multiple of 16; `weights`: the shorter one
// whose results are rounded to bfloat16.
void exp2_cpu(const float* x, float* y, int64_t count, bool weights);

}  // namespace specdec

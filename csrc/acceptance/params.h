// Plain structs of the acceptance and sampling ops, shared by the CPU kernels, the CUDA launchers and the bindings.
//
// As in common/types.h: pointers, sizes, strides in elements, 64-bit offsets; the last dimension of every tensor is
// contiguous, and outputs and integer inputs are contiguous altogether unless a stride says otherwise.
#pragma once

#include <cstdint>

#include "common/sampling_params.h"
#include "common/types.h"

namespace specdec {

enum class AcceptRule : int32_t {
  kGreedy = 0,
  kMatch = 1,
  kRecursive = 2,
  kTraversal = 3,
  kTargetOnly = 4,
  kKseq = 5,
  kTypical = 6,
  kLongestPath = 7,
};

// Bits of the per-request status. Zero: nothing was odd.
enum AcceptStatus : int32_t {
  kTargetInvalid = 1,         // a target row with a NaN or +inf, or without any finite logit
  kDraftInvalid = 2,          // the same of a draft row: its children are not tried
  kDraftTokenImpossible = 4,  // a drafted token that its draft row gives no probability, or no token at all
  kResidualEmpty = 8,         // rounding left nothing to draw from
  kTreeInvalid = 16,          // a link that points back or out of the tree: taken as none
  kSettingInvalid = 32,       // a temperature of NaN or below 0, taken as 0, or a top_p of NaN, taken as off
};

// One value for all requests, or one for each.
template <class T>
struct PerRequest {
  const T* values;  // [batch], or nullptr
  T value;
};

// How logits become a distribution.
struct SamplingParams {
  PerRequest<float> temperature;  // 0: the argmax
  PerRequest<int32_t> top_k;      // 0: off
  PerRequest<float> top_p;        // 1: off
};

template <class T>
SPECDEC_HOST_DEVICE T value_of(const PerRequest<T>& number, int32_t request) {
  return number.values ? number.values[request] : number.value;
}

SPECDEC_HOST_DEVICE float temperature_of(const SamplingParams& sampling, int32_t request) {
  return sampling_temperature(value_of(sampling.temperature, request));
}

// kSettingInvalid, or 0.
SPECDEC_HOST_DEVICE int32_t setting_status(const SamplingParams& sampling, int32_t request) {
  const float top_p = value_of(sampling.top_p, request);
  return is_temperature(value_of(sampling.temperature, request)) && top_p == top_p ? 0 : kSettingInvalid;
}

// Row n of the target belongs to node n. Row r of the draft belongs to the children of node r or, with child_rows, to
// node r itself. Node 0 is the last committed token (longest path: the first root); its token is never read otherwise.
struct AcceptParams {
  const void* target;              // logits [batch, nodes, vocab], or int32 ids [batch, nodes] if target_is_ids
  const void* draft;               // logits [batch, rows, draft_vocab], or nullptr: drafted deterministically
  const int32_t* draft_tokens;     // [batch, ...]: the token of node n is in column n - first_token_node
  const int32_t* target_to_draft;  // [vocab], -1 where the draft has no such token; nullptr: one vocabulary
  const int32_t* first_child;      // [batch or 1, nodes], or nullptr: a chain
  const int32_t* next_sibling;     // [batch or 1, nodes], or nullptr: a chain
  const int32_t* num_nodes;        // [batch or 1]
  int64_t target_stride_batch, target_stride_node;
  int64_t draft_stride_batch, draft_stride_row;
  int64_t draft_tokens_stride_batch;
  int64_t links_stride_batch;      // nodes, or 0 to broadcast
  int64_t num_nodes_stride_batch;  // 1, or 0 to broadcast

  SamplingParams target_sampling, draft_sampling;
  PerRequest<int64_t> seed;
  PerRequest<int32_t> position;  // absolute position of node 0

  int32_t* tokens;        // [batch, max_depth + 1]: accepted tokens, the next token, then -1
  int32_t* path;          // [batch, max_depth + 1]: accepted nodes from node 0 on, then -1
  int32_t* num_accepted;  // [batch]
  int32_t* next_tokens;   // [batch, width]
  int32_t* status;        // [batch]
  bool* finished;         // [batch]: the last token emitted is in eos

  AcceptRule rule;
  DType target_dtype, draft_dtype;
  int32_t batch, nodes, vocab, draft_vocab, max_depth, width;
  int32_t first_token_node;  // 1 for a chain, else 0
  int32_t eos[kMaxEos];
  int32_t eos_count;
  float thresholds[2];  // target_only: single, accumulated; typical: epsilon, delta
  bool target_is_ids, replacement, child_rows;
};

enum class SampleDomain : int32_t { kSample = 0, kDraft = 1 };

// `count` tokens of every row: one draw's best, or with replacement one draw each.
struct SampleParams {
  const void* logits;              // [batch, rows, vocab]
  const int32_t* draft_to_target;  // [vocab], or nullptr: the ids of the row are the tokens
  const int32_t* parents;  // [batch, rows]: the node that the children of a row hang on; nullptr: first_parent + row
  int64_t logits_stride_batch, logits_stride_row;

  SamplingParams sampling;
  PerRequest<int64_t> seed;
  PerRequest<int32_t> position;  // kSample: of the token itself; kDraft: of node 0

  int32_t* tokens;   // [batch, rows, count], -1 where fewer tokens have a probability
  float* logprobs;   // [batch, rows, count] natural logarithms, or nullptr
  float* logsumexp;  // [batch, rows] of logits / temperature over the kept tokens, or nullptr
  int32_t* status;   // [batch]

  SampleDomain domain;
  DType dtype;
  int32_t batch, rows, vocab, count, first_parent;
  bool replacement;
};

}  // namespace specdec

// The acceptance and sampling ops of specdec_ops._C.
#include <algorithm>
#include <string_view>

#include "acceptance/cpu/entry_points.h"
#include "acceptance/params.h"
#include "bindings/bind.h"
#include "struct_fields/acceptance.h"
#ifdef SPECDEC_WITH_CUDA
#include "acceptance/cuda/launchers.h"
#endif

namespace specdec {

// To the contract, `nodes` is an output: the accepted path.
static constexpr bool is_derived(const AcceptParams&, std::string_view name) { return name == "nodes"; }

static void derive(AcceptParams& p, Call& call) {
  Tensor target = call.tensor("target"), draft = call.tensor("draft_logits"), tokens = call.tensor("tokens");
  Tensor first_child = call.tensor("first_child"), next_tokens = call.tensor("next_tokens");
  p.target_is_ids = target.dims() == 2;
  p.target_dtype = p.target_is_ids ? DType{} : target.dtype();
  p.target_stride_batch = target.stride(0), p.target_stride_node = target.stride(1);
  p.draft = draft.address();
  p.draft_dtype = draft.dtype();
  p.draft_stride_batch = draft ? draft.stride(0) : 0;
  p.draft_stride_row = draft ? draft.stride(1) : 0;
  p.draft_tokens_stride_batch = call.tensor("draft_tokens").stride(0);
  p.first_token_node = first_child ? 0 : 1;
  p.links_stride_batch = first_child.broadcast_stride(0);
  p.num_nodes_stride_batch = call.tensor("num_nodes").broadcast_stride(0);
  bind_fields(p.target_sampling, call);
  bind_fields(p.draft_sampling, call, "draft_");
  p.eos_count = std::min(call.list("eos").size(), int(kMaxEos));
  p.path = static_cast<int32_t*>(call.tensor("nodes").address());
  p.batch = int32_t(tokens.size(0));
  p.nodes = int32_t(target.size(1));
  p.vocab = p.target_is_ids ? 0 : int32_t(target.size(2));
  p.draft_vocab = draft ? int32_t(draft.size(2)) : p.vocab;
  p.max_depth = int32_t(tokens.size(1)) - 1;
  p.width = next_tokens.dims() == 2 ? int32_t(next_tokens.size(1)) : 1;
}

static void derive(SampleParams& p, Call& call) {
  Tensor logits = call.tensor("logits");
  p.dtype = logits.dtype();
  p.logits_stride_batch = logits.stride(0), p.logits_stride_row = logits.stride(1);
  bind_fields(p.sampling, call);
  p.batch = int32_t(logits.size(0)), p.rows = int32_t(logits.size(1)), p.vocab = int32_t(logits.size(2));
}

void bind_acceptance(py::module_& m) {
  bind_op(m, "accept", accept_cpu);
  bind_op(m, "sample", sample_cpu);
#ifdef SPECDEC_WITH_CUDA
  bind_cuda<AcceptParams>(m, "accept", accept_scratch, accept_cuda);
  bind_cuda<SampleParams>(m, "sample", sample_scratch, sample_cuda);
#endif
}

}  // namespace specdec

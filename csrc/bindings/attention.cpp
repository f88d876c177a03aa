// The attention ops of specdec_ops._C.
#include <algorithm>
#include <cstdint>

#include "attention/cpu/entry_points.h"
#include "attention/params.h"
#include "bindings/bind.h"
#include "struct_fields/attention.h"
#ifdef SPECDEC_WITH_CUDA
#include "attention/cuda/launchers.h"
#endif

namespace specdec {

static void derive(MergeStatesParams& p, Call& call) {
  Tensor out = call.tensor("out");
  p.rows = call.tensor("lse").elements();
  p.dim = int32_t(out.size(-1));
  p.dtype = out.dtype();
}

static constexpr int64_t kMaxSlots = 1 << 30;  // of a request: kernels count slots in 32 bits, and nobody reaches more
static constexpr int64_t kMaxInt32 = 0x7fffffff;

static void derive(TreeAttentionParams& p, Call& call) {
  Tensor q = call.tensor("q"), out = call.tensor("out"), k = call.tensor("k_cache"), v = call.tensor("v_cache");
  Tensor context_lens = call.tensor("context_lens"), page_table = call.tensor("page_table");
  Tensor ancestors = call.tensor("ancestors");
  const bool packed = bool(call.tensor("offsets")), paged = bool(page_table), tree = bool(ancestors);
  p.q_stride_batch = packed ? 0 : q.stride(0);
  p.q_stride_row = q.stride(-3), p.q_stride_head = q.stride(-2);
  p.out_stride_batch = packed ? 0 : out.stride(0);
  p.out_stride_row = out.stride(-3), p.out_stride_head = out.stride(-2);
  p.k_stride_batch = k.stride(0), p.k_stride_slot = k.stride(1), p.k_stride_head = k.stride(2);
  p.v_stride_batch = v.stride(0), p.v_stride_slot = v.stride(1), p.v_stride_head = v.stride(2);
  p.page_table_stride = paged ? page_table.stride(0) : 0;
  p.dtype = q.dtype();
  p.float8_cache = k.element() == Element::kFloat8;
  p.batch = int32_t(context_lens.size(0));
  p.queries = int32_t(q.size(-3)), p.heads = int32_t(q.size(-2)), p.dim = int32_t(q.size(-1));
  p.kv_heads = int32_t(k.size(2));
  p.slots = int32_t(std::min(paged ? page_table.size(1) * k.size(1) : k.size(1), kMaxSlots));
  p.pages = paged ? int32_t(std::min(k.size(0), kMaxInt32)) : 0;
  p.page_size = paged ? int32_t(std::min(k.size(1), kMaxInt32)) : 0;
  p.topology_batch = tree ? int32_t(ancestors.size(0)) : 1;
  p.nodes = tree ? int32_t(ancestors.size(1)) : 0;
  p.words = tree ? int32_t(ancestors.size(2)) : 0;
}

void bind_attention(py::module_& m) {
  bind_op(m, "merge_states", merge_states_cpu);
  bind_op(m, "tree_attention", tree_attention_cpu);
#ifdef SPECDEC_WITH_CUDA
  bind_cuda<MergeStatesParams, MergeStatesParams>(m, "merge_states", nullptr, merge_states_cuda);
  bind_cuda<TreeAttentionParams, TreeAttentionParams>(m, "tree_attention", tree_attention_scratch, tree_attention_cuda);
#endif
}

}  // namespace specdec

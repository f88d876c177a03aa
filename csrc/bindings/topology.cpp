// The topology ops of specdec_ops._C.
#include <algorithm>

#include "bindings/bind.h"
#include "struct_fields/topology.h"
#include "topology/cpu/entry_points.h"
#include "topology/params.h"
#ifdef SPECDEC_WITH_CUDA
#include "topology/cuda/launchers.h"
#endif

namespace specdec {

static void derive(BuildTopologyParams& p, Call& call) {
  Tensor ancestors = call.tensor("ancestors");
  p.batch = int32_t(ancestors.size(0));
  p.nodes = int32_t(ancestors.size(1));
  p.words = int32_t(ancestors.size(2));
}

static void derive(GrowTreeParams& p, Call& call) {
  Tensor top = call.tensor("top_logprobs"), frontier = call.tensor("frontier_tokens"), tokens = call.tensor("tokens");
  Tensor ancestors = call.tensor("ancestors"), map = call.tensor("draft_to_target");
  p.eos_count = std::min(call.list("eos").size(), int(kMaxEos));
  p.batch = int32_t(top.size(0)), p.rows = int32_t(top.size(1)), p.branching = int32_t(top.size(2));
  p.width = int32_t(frontier.size(1));
  p.size = int32_t(tokens.size(1));
  p.nodes = int32_t(ancestors.size(1)), p.words = int32_t(ancestors.size(2));
  p.draft_vocab = map ? int32_t(map.size(0)) : 0;
}

static void derive(PruneTreeParams& p, Call& call) {
  Tensor scores = call.tensor("scores");
  p.batch = int32_t(scores.size(0)), p.size = int32_t(scores.size(1));
  p.words = int32_t(call.tensor("ancestors").size(2));
}

void bind_topology(py::module_& m) {
  bind_op(m, "build_topology", build_topology_cpu);
  bind_op(m, "grow_tree", grow_tree_cpu);
  bind_op(m, "prune_tree", prune_tree_cpu);
#ifdef SPECDEC_WITH_CUDA
  bind_cuda<BuildTopologyParams, BuildTopologyParams>(m, "build_topology", nullptr, build_topology_cuda);
  bind_cuda<GrowTreeParams, GrowTreeParams>(m, "grow_tree", nullptr, grow_tree_cuda);
  bind_cuda<PruneTreeParams, PruneTreeParams>(m, "prune_tree", nullptr, prune_tree_cuda);
#endif
}

}  // namespace specdec

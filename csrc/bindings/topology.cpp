// build_topology of specdec_ops._C.
#include "struct_fields/topology.h"
#include "bindings/bind.h"
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

void bind_topology(py::module_& m) {
  bind_op(m, "build_topology", build_topology_cpu);
#ifdef SPECDEC_WITH_CUDA
  bind_cuda<BuildTopologyParams, BuildTopologyParams>(m, "build_topology", nullptr, build_topology_cuda);
#endif
}

}  // namespace specdec

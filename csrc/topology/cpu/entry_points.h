// The CPU kernel of build_topology, as the bindings call it.
#pragma once

#include "topology/params.h"

namespace specdec {

void build_topology_cpu(const BuildTopologyParams& params, int threads);

}  // namespace specdec

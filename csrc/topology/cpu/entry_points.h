// The CPU kernels of the topology ops, as the bindings call them.
#pragma once

#include "topology/params.h"

namespace specdec {

void build_topology_cpu(const BuildTopologyParams& params, int threads);
void grow_tree_cpu(const GrowTreeParams& params, int threads);
void prune_tree_cpu(const PruneTreeParams& params, int threads);

}  // namespace specdec

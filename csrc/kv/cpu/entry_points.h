// The CPU kernel of kv_propagate, as the bindings call it. It throws std::invalid_argument on a place that is not in the
// cache, naming the argument and the row.
#pragma once

#include "kv/params.h"

namespace specdec {

void kv_propagate_cpu(const KvPropagateParams& params, int threads);

}  // namespace specdec

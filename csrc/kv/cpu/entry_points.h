// The CPU kernels of this family, as the bindings call them.
#pragma once

#include "kv/params.h"

namespace specdec {

void kv_append_cpu(const KvAppendParams& params, int threads);
void kv_propagate_cpu(const KvPropagateParams& params, int threads);

}  // namespace specdec

// The CPU kernels of the KV ops, as the bindings call them.
#pragma once

#include "kv/params.h"

namespace specdec {

void kv_append_cpu(const KvAppendParams& params, int threads);
void gather_layer_kv_cpu(const GatherLayerKvParams& params, int threads);

void kv_commit_cpu(const KvCommitParams& params, int threads);

void kv_propagate_cpu(const KvPropagateParams& params, int threads);

}  // namespace specdec

// The CUDA launchers of the KV ops, as the bindings call them. They return errors, never synchronise and never exit.
#pragma once

#include "common/cuda/launch.h"
#include "kv/params.h"

namespace specdec {

cudaError_t kv_append_cuda(const KvAppendParams& params, int device, cudaStream_t stream);
cudaError_t gather_layer_kv_cuda(const GatherLayerKvParams& params, int device, cudaStream_t stream);

cudaError_t kv_commit_cuda(const KvCommitParams& params, int device, cudaStream_t stream);

cudaError_t kv_propagate_cuda(const KvPropagateParams& params, int device, cudaStream_t stream);

}  // namespace specdec

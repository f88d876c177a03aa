// Picks kv_propagate's instantiation, one dtype to a file: kv_propagate_*.cu.
#include "kv/cuda/kv_propagate.cuh"

#include "kv/cuda/launchers.h"

namespace specdec::cuda {

extern template cudaError_t kv_propagate<float>(KvLaunch&, int, cudaStream_t);
extern template cudaError_t kv_propagate<BFloat16>(KvLaunch&, int, cudaStream_t);
extern template cudaError_t kv_propagate<Float16>(KvLaunch&, int, cudaStream_t);

}  // namespace specdec::cuda

namespace specdec {

using namespace cuda;

cudaError_t kv_propagate_cuda(const KvPropagateParams& p, int device, cudaStream_t stream) {
  if (p.rows == 0 || p.count == 0) return cudaSuccess;
  KvLaunch kv{};
  kv.call = p;
  kv.parts = p.head_dim > kKvChannels ? (p.head_dim + kKvChannels - 1) / kKvChannels : 0;
  const int32_t heads = max(1, kKvChannels / p.head_dim);  // of a tile
  kv.tiles = kv.parts > 0 ? p.kv_heads * kv.parts : (p.kv_heads + heads - 1) / heads;
  const int64_t size = element_bytes(p.dtype);
  uintptr_t weights = uintptr_t(p.dim * size);
  for (int32_t i = 0; i < p.count; ++i) {
    weights |= reinterpret_cast<uintptr_t>(p.layers[i].k_weight) | reinterpret_cast<uintptr_t>(p.layers[i].v_weight);
  }
  kv.weights_aligned = weights % 16 == 0;
  const uintptr_t hidden = reinterpret_cast<uintptr_t>(p.hidden) | uintptr_t(p.hidden_stride_row * size);
  kv.hidden_aligned = (hidden | uintptr_t(p.dim * size)) % 16 == 0;
  switch (p.dtype) {
    case DType::kFloat32:
      return kv_propagate<float>(kv, device, stream);
    case DType::kBFloat16:
      return kv_propagate<BFloat16>(kv, device, stream);
    case DType::kFloat16:
      return kv_propagate<Float16>(kv, device, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace specdec

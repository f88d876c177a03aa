// Picks kv_append's instantiation by dtype, and says whether it may take two elements at a time.
#include "kv/cuda/kv_append.cuh"

#include "kv/cuda/launchers.h"

namespace specdec::cuda {
namespace {

// Whether every two elements from an even one on are aligned to their size: the address in bytes, strides in elements.
bool goes_in_twos(const void* address, int64_t bytes, int64_t stride_batch, int64_t stride_row, int64_t stride_head) {
  return reinterpret_cast<uintptr_t>(address) % uint64_t(2 * bytes) == 0 &&
         ((stride_batch | stride_row | stride_head) & 1) == 0;
}

bool goes_in_twos(const KvAppendParams& p) {
  const int64_t size = element_bytes(p.dtype), cached = p.code == CacheCode::kPlain ? size : 1;
  return p.pairs % 2 == 0 && p.k_dim % 2 == 0 && p.v_dim % 2 == 0 &&
         goes_in_twos(p.k, size, p.k_stride_batch, p.k_stride_row, p.k_stride_head) &&
         goes_in_twos(p.v, size, p.v_stride_batch, p.v_stride_row, p.v_stride_head) &&
         goes_in_twos(p.q, size, p.q_stride_batch, p.q_stride_row, p.q_stride_head) &&
         goes_in_twos(p.q_out, size, p.out_stride_batch, p.out_stride_row, p.out_stride_head) &&
         goes_in_twos(p.k_cache, cached, p.k_cache_stride_batch, p.k_cache_stride_slot, p.k_cache_stride_head) &&
         goes_in_twos(p.v_cache, cached, p.v_cache_stride_batch, p.v_cache_stride_slot, p.v_cache_stride_head);
}

}  // namespace
}  // namespace specdec::cuda

namespace specdec {

using namespace cuda;

cudaError_t kv_append_cuda(const KvAppendParams& p, int device, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  KvAppendLaunch launch{};
  launch.call = p;
  launch.in_twos = goes_in_twos(p);
  switch (p.dtype) {
    case DType::kFloat32:
      return kv_append<float>(launch, device, stream);
    case DType::kBFloat16:
      return kv_append<BFloat16>(launch, device, stream);
    case DType::kFloat16:
      return kv_append<Float16>(launch, device, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace specdec

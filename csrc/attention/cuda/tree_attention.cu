// Picks tree_attention's instantiation: one dtype, cache and compiled dimension to a file, tree_attention_*.cu. fp8
// caches are compiled for dims 64 and 128, which nearly all models have.
#include "attention/cuda/launchers.h"
#include "attention/cuda/tree_attention_kernel.cuh"

namespace specdec::cuda {

#define SPECDEC_ELSEWHERE(T, Cache, dim) \
  extern template cudaError_t tree_attention<T, Cache, dim>(const TreeAttentionParams&, int, cudaStream_t)
SPECDEC_ELSEWHERE(BFloat16, BFloat16, 64);
SPECDEC_ELSEWHERE(BFloat16, BFloat16, 96);
SPECDEC_ELSEWHERE(BFloat16, BFloat16, 128);
SPECDEC_ELSEWHERE(BFloat16, BFloat16, 192);
SPECDEC_ELSEWHERE(BFloat16, BFloat16, 256);
SPECDEC_ELSEWHERE(BFloat16, Float8, 64);
SPECDEC_ELSEWHERE(BFloat16, Float8, 128);
SPECDEC_ELSEWHERE(Float16, Float16, 64);
SPECDEC_ELSEWHERE(Float16, Float16, 96);
SPECDEC_ELSEWHERE(Float16, Float16, 128);
SPECDEC_ELSEWHERE(Float16, Float16, 192);
SPECDEC_ELSEWHERE(Float16, Float16, 256);
SPECDEC_ELSEWHERE(Float16, Float8, 64);
SPECDEC_ELSEWHERE(Float16, Float8, 128);

namespace {

int compiled_dim(const TreeAttentionParams& p) {
  for (const int compiled : {64, 96, 128, 192}) {
    if (p.dim <= compiled && (compiled != 96 || p.float8_cache == 0)) return compiled;
  }
  return 256;
}

bool is_aligned(const void* address, int64_t elements, int64_t batch, int64_t row, int64_t head) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0 && (batch | row | head) % elements == 0;
}

// Rows start at multiples of 16 bytes: everything is copied in such pieces.
bool is_aligned(const TreeAttentionParams& p) {
  const int64_t cached = p.float8_cache != 0 ? 16 : 8;
  return is_aligned(p.q, 8, p.q_stride_batch, p.q_stride_row, p.q_stride_head) &&
         is_aligned(p.out, 8, p.out_stride_batch, p.out_stride_row, p.out_stride_head) &&
         is_aligned(p.k_cache, cached, p.k_stride_batch, p.k_stride_slot, p.k_stride_head) &&
         is_aligned(p.v_cache, cached, p.v_stride_batch, p.v_stride_slot, p.v_stride_head);
}

bool is_built(const TreeAttentionParams& p) {
  if (p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16) return false;
  return p.dim > 0 && p.dim % 16 == 0 && p.dim <= (p.float8_cache != 0 ? 128 : 256);
}

template <class T>
cudaError_t attend_in(const TreeAttentionParams& params, int device, cudaStream_t stream) {
  const int dim = compiled_dim(params);
  if (params.float8_cache != 0) {
    return dim == 64 ? tree_attention<T, Float8, 64>(params, device, stream)
                     : tree_attention<T, Float8, 128>(params, device, stream);
  }
  switch (dim) {
    case 64:
      return tree_attention<T, T, 64>(params, device, stream);
    case 96:
      return tree_attention<T, T, 96>(params, device, stream);
    case 128:
      return tree_attention<T, T, 128>(params, device, stream);
    case 192:
      return tree_attention<T, T, 192>(params, device, stream);
    default:
      return tree_attention<T, T, 256>(params, device, stream);
  }
}

}  // namespace

}  // namespace specdec::cuda

namespace specdec {

using namespace cuda;

CallScratch tree_attention_scratch(const TreeAttentionParams& params) {
  CallScratch most = {0, 0};  // of all devices
  const int dim = compiled_dim(params);
  for (const int most_rows : {64, 128}) {
    if (most_rows == 64 && dim <= 192) continue;
    const int rows = tree_attention_rows(params, dim, most_rows);
    const TreeAttentionLaunch launch = tree_attention_launch(params, rows, dim);
    if (launch.max_splits == 1) continue;
    const int64_t counters = int64_t(launch.requests) * params.kv_heads * launch.row_blocks;
    const int64_t bytes = counters * launch.max_splits * rows * (dim + 2) * int64_t(sizeof(float));
    most = {bytes > most.bytes ? bytes : most.bytes, counters > most.counters ? counters : most.counters};
  }
  return most;
}

cudaError_t tree_attention_cuda(const TreeAttentionParams& params, int device, cudaStream_t stream) {
  if (params.batch == 0 || params.queries == 0) return cudaSuccess;
  if (!is_built(params) || !is_aligned(params)) return cudaErrorInvalidValue;
  if (int64_t(params.queries) * (params.heads / params.kv_heads) > 0x7fffffff - 128) return cudaErrorInvalidValue;
  if (params.dtype == DType::kBFloat16) return attend_in<BFloat16>(params, device, stream);
  return attend_in<Float16>(params, device, stream);
}

}  // namespace specdec

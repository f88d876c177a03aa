// Picks tree_attention's instantiation: one dtype and one of the compiled dimensions to a file, tree_attention_*.cu.
#include "cuda/launchers.h"
#include "specdec/tree_attention_kernel.cuh"

namespace specdec {

extern template cudaError_t tree_attention<BFloat16, 64>(const TreeAttentionParams&, int, cudaStream_t);
extern template cudaError_t tree_attention<BFloat16, 96>(const TreeAttentionParams&, int, cudaStream_t);
extern template cudaError_t tree_attention<BFloat16, 128>(const TreeAttentionParams&, int, cudaStream_t);
extern template cudaError_t tree_attention<BFloat16, 192>(const TreeAttentionParams&, int, cudaStream_t);
extern template cudaError_t tree_attention<BFloat16, 256>(const TreeAttentionParams&, int, cudaStream_t);
extern template cudaError_t tree_attention<Float16, 64>(const TreeAttentionParams&, int, cudaStream_t);
extern template cudaError_t tree_attention<Float16, 96>(const TreeAttentionParams&, int, cudaStream_t);
extern template cudaError_t tree_attention<Float16, 128>(const TreeAttentionParams&, int, cudaStream_t);
extern template cudaError_t tree_attention<Float16, 192>(const TreeAttentionParams&, int, cudaStream_t);
extern template cudaError_t tree_attention<Float16, 256>(const TreeAttentionParams&, int, cudaStream_t);

namespace {

int compiled_dim(int dim) {
  for (const int compiled : {64, 96, 128, 192}) {
    if (dim <= compiled) return compiled;
  }
  return 256;
}

// Rows must start at multiples of 16 bytes: keys, values and queries are copied in such pieces.
bool is_aligned(const void* address, int64_t batch, int64_t row, int64_t head) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0 && (batch | row | head) % 8 == 0;
}
bool is_aligned(const TreeAttentionParams& p) {
  return is_aligned(p.q, p.q_stride_batch, p.q_stride_row, p.q_stride_head) &&
         is_aligned(p.k_cache, p.k_stride_batch, p.k_stride_slot, p.k_stride_head) &&
         is_aligned(p.v_cache, p.v_stride_batch, p.v_stride_slot, p.v_stride_head) &&
         reinterpret_cast<uintptr_t>(p.out) % 4 == 0 &&
         (p.out_stride_batch | p.out_stride_row | p.out_stride_head) % 2 == 0;
}

template <class T>
cudaError_t attend_in(const TreeAttentionParams& params, int device, cudaStream_t stream) {
  switch (compiled_dim(params.dim)) {
    case 64:
      return tree_attention<T, 64>(params, device, stream);
    case 96:
      return tree_attention<T, 96>(params, device, stream);
    case 128:
      return tree_attention<T, 128>(params, device, stream);
    case 192:
      return tree_attention<T, 192>(params, device, stream);
    default:
      return tree_attention<T, 256>(params, device, stream);
  }
}

}  // namespace

TreeAttentionScratch tree_attention_scratch(const TreeAttentionParams& params) {
  const int dim = compiled_dim(params.dim), rows = tree_attention_rows(params, dim);
  const TreeAttentionLaunch launch = tree_attention_launch(params, rows);
  const int64_t counters = int64_t(params.batch) * params.kv_heads * launch.row_blocks;
  const int64_t floats = launch.max_parts > 1 ? counters * launch.max_parts * rows * (dim + 2) : 0;
  return {floats, counters};
}

cudaError_t tree_attention_cuda(const TreeAttentionParams& params, int device, cudaStream_t stream) {
  if (params.batch == 0 || params.queries == 0) return cudaSuccess;
  if (params.dim % 16 != 0 || params.dim > 256 || params.dtype == DType::kFloat32) return cudaErrorInvalidValue;
  if (!is_aligned(params)) return cudaErrorInvalidValue;
  if (params.dtype == DType::kBFloat16) return attend_in<BFloat16>(params, device, stream);
  return attend_in<Float16>(params, device, stream);
}

}  // namespace specdec

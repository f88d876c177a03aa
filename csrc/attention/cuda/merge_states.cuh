// Merges two partial attentions over disjoint slots, row by row.
//
// A row is one (request, query, head). `lanes` neighbouring threads of one warp own a row: the least power of two that
// covers its packs of 16 bytes, at most the whole warp; a block has as many rows as fit. Each output element is made by
// one thread from the two elements in the same place, so out may be one of the inputs; the row's log-sum-exps are read
// by all of its lanes before one of them writes the merged one, so lse may be, too. Bytes: three times the output and
// 12 per row, each moved once, which is the whole cost.
//
// Weights are w_a = 1 / (1 + e^(lse_b - lse_a)) and the same with a and b exchanged. They need no maximum and no
// division by a sum that might be zero, and a part of weight 0 (of lse -inf, or far below the other) is not read at
// all, so whatever its rows hold, NaN included, can't reach the result. A log-sum-exp of NaN or +inf makes all of the
// row NaN.
#pragma once

#include "attention/params.h"
#include "common/cuda/device.cuh"

namespace specdec::cuda {

constexpr int kMergeStatesThreads = 256;

template <class T, int kPack>
__global__ void __launch_bounds__(kMergeStatesThreads) merge_states_kernel(MergeStatesParams p) {
  using Vector = Pack<T, kPack>;
  const Vector* out_a = static_cast<const Vector*>(p.out_a);
  const Vector* out_b = static_cast<const Vector*>(p.out_b);
  Vector* out = static_cast<Vector*>(p.out);
  const int32_t packs = p.dim / kPack;
  const float nothing = negative_infinity();

  const int64_t rows_at_once = int64_t(gridDim.x) * blockDim.y;
  for (int64_t block_row = int64_t(blockIdx.x) * blockDim.y; block_row < p.rows; block_row += rows_at_once) {
    const int64_t row = block_row + threadIdx.y;
    const bool exists = row < p.rows;
    const float lse_a = exists ? p.lse_a[row] : nothing;
    const float lse_b = exists ? p.lse_b[row] : nothing;
    const bool has_a = lse_a != nothing;
    const bool has_b = lse_b != nothing;
    const bool sound = lse_a < -nothing && lse_b < -nothing;
    float weight_a = has_b ? 1.0f / (1.0f + expf(lse_b - lse_a)) : has_a ? 1.0f : 0.0f;
    float weight_b = has_a ? 1.0f / (1.0f + expf(lse_a - lse_b)) : has_b ? 1.0f : 0.0f;
    if (!sound) weight_a = weight_b = nothing - nothing;
    warp_sync();  // every lane of the row has its log-sum-exps

    if (exists && threadIdx.x == 0) {
      const float larger = fmaxf(lse_a, lse_b);
      const float joint = has_a && has_b ? larger + log1pf(expf(-fabsf(lse_a - lse_b))) : larger;
      p.lse[row] = sound ? joint : weight_a;
    }
    for (int32_t pack = threadIdx.x; exists && pack < packs; pack += blockDim.x) {
      const int64_t place = row * packs + pack;
      float sum[kPack] = {};
      if (weight_a != 0.0f) {
        const Vector part = out_a[place];
#pragma unroll
        for (int i = 0; i < kPack; ++i) sum[i] = weight_a * to_float(part.element[i]);
      }
      if (weight_b != 0.0f) {
        const Vector part = out_b[place];
#pragma unroll
        for (int i = 0; i < kPack; ++i) sum[i] += weight_b * to_float(part.element[i]);
      }
      Vector merged;
#pragma unroll
      for (int i = 0; i < kPack; ++i) merged.element[i] = from_float<T>(sum[i]);
      out[place] = merged;
    }
  }
}

template <class T, int kPack>
cudaError_t merge_states(const MergeStatesParams& p, int device, cudaStream_t stream) {
  if (p.rows == 0 || p.dim == 0) return cudaSuccess;
  int lanes = 1;
  while (lanes < kWarpSize && lanes < p.dim / kPack) lanes *= 2;
  const int64_t rows_per_block = kMergeStatesThreads / lanes;
  const int64_t blocks = (p.rows + rows_per_block - 1) / rows_per_block;
  const dim3 grid(static_cast<unsigned>(blocks < 0x7fffffff ? blocks : 0x7fffffff));
  const dim3 block(lanes, static_cast<unsigned>(rows_per_block));
  return launch(merge_states_kernel<T, kPack>, grid, block, 0, device, stream, p);
}

// Whether every row starts at a multiple of 16 bytes.
template <class T>
bool merges_in_packs(const MergeStatesParams& p) {
  const auto addresses =
      reinterpret_cast<uintptr_t>(p.out_a) | reinterpret_cast<uintptr_t>(p.out_b) | reinterpret_cast<uintptr_t>(p.out);
  return (addresses | (size_t(p.dim) * sizeof(T))) % 16 == 0;
}

}  // namespace specdec::cuda

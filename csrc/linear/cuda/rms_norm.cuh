// The norm of rows: a block has a row, reads it for its squares and, from the L1 cache, for its result. Packs of 16
// bytes where rows start and end at multiples of that, else element by element. Bytes: x, residual and out once.
#pragma once

#include "common/cuda/block_team.cuh"
#include "common/cuda/device.cuh"
#include "linear/params.h"

namespace specdec::cuda {

constexpr int kRmsNormThreads = 256;

// A launch: the call and what the host derives from it.
struct RmsNormLaunch {
  RmsNormParams call;
  bool aligned;  // rows of x, residual and out
};

template <class T>
__device__ __forceinline__ float norm_weight_at(const RmsNormParams& p, int32_t d) {
  return p.weight_dtype == DType::kFloat32 ? static_cast<const float*>(p.weight)[d]
                                           : to_float(static_cast<const T*>(p.weight)[d]);
}

// Elements [d, d + kCount) of a row.
template <class T, int kCount>
__device__ __forceinline__ void write_normed(const RmsNormParams& p, const T* x, const T* residual, T* out, int32_t d,
                                             float scale) {
  using Elements = Pack<T, kCount>;
  const Elements from = *reinterpret_cast<const Elements*>(x + d);
  Elements added{}, to;
  if (residual != nullptr) added = *reinterpret_cast<const Elements*>(residual + d);
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    float y = to_float(from.element[e]) * scale * norm_weight_at<T>(p, d + e);
    if (residual != nullptr) y += to_float(added.element[e]);
    to.element[e] = from_float<T>(y);
  }
  *reinterpret_cast<Elements*>(out + d) = to;
}

template <class T>
__global__ void __launch_bounds__(kRmsNormThreads) rms_norm_kernel(RmsNormLaunch launch) {
  const RmsNormParams& p = launch.call;
  constexpr int kPack = 16 / int(sizeof(T));
  SPECDEC_SHARED(uint32_t, slots, [TeamReducer::kWords]);
  TeamReducer reduce({int32_t(threadIdx.x), kRmsNormThreads}, slots);
#pragma unroll 1
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride_row;
    const T* residual =
        p.residual == nullptr ? nullptr : static_cast<const T*>(p.residual) + row * p.residual_stride_row;
    T* out = static_cast<T*>(p.out) + row * p.out_stride_row;
    float squares = 0.0f;
    for (int32_t d = int32_t(threadIdx.x) * kPack; d < p.dim; d += kRmsNormThreads * kPack) {
      if (launch.aligned) {
        const auto pack = *reinterpret_cast<const Pack<T, kPack>*>(x + d);
#pragma unroll
        for (int e = 0; e < kPack; ++e) squares += to_float(pack.element[e]) * to_float(pack.element[e]);
      } else {
#pragma unroll 1
        for (int32_t e = d; e < min(d + kPack, p.dim); ++e) squares += to_float(x[e]) * to_float(x[e]);
      }
    }
    const float scale = 1.0f / sqrtf(reduce.sum(squares) / float(p.dim) + p.eps);
    for (int32_t d = int32_t(threadIdx.x) * kPack; d < p.dim; d += kRmsNormThreads * kPack) {
      if (launch.aligned) {
        write_normed<T, kPack>(p, x, residual, out, d, scale);
      } else {
#pragma unroll 1
        for (int32_t e = d; e < min(d + kPack, p.dim); ++e) write_normed<T, 1>(p, x, residual, out, e, scale);
      }
    }
  }
}

template <class T>
cudaError_t rms_norm(const RmsNormParams& p, int device, cudaStream_t stream) {
  const uintptr_t addresses =
      reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.residual) | reinterpret_cast<uintptr_t>(p.out);
  const int64_t sizes = p.x_stride_row | p.residual_stride_row | p.out_stride_row | p.dim;
  const RmsNormLaunch norm{p, (addresses | uintptr_t(sizes * int64_t(sizeof(T)))) % 16 == 0};
  return launch(rms_norm_kernel<T>, dim3(unsigned(p.rows)), dim3(kRmsNormThreads), 0, device, stream, norm);
}

}  // namespace specdec::cuda

// Every device intrinsic and every part of the CUDA runtime that the kernels use, behind one name each.
//
// A kernel file includes this header and params.h, and nothing of CUDA. That keeps the list of what a kernel may do
// short enough to be provided by something else than a GPU. Rules for kernels: no raw intrinsics, no raw __shared__, no
// return before a barrier, no `<<<>>>`.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace specdec {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

constexpr int kWarpSize = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(BFloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(Float16 value) { return __half2float(value); }

// Rounds to nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ Float16 from_float<Float16>(float value) {
  return __float2half_rn(value);
}

__device__ __forceinline__ float negative_infinity() { return -__int_as_float(0x7f800000); }
__device__ __forceinline__ int popcount(uint64_t bits) { return __popcll(bits); }
__device__ __forceinline__ int lowest_bit(uint32_t bits) { return __ffs(bits) - 1; }  // -1 for none

__device__ __forceinline__ void block_sync() { __syncthreads(); }
__device__ __forceinline__ void warp_sync() { __syncwarp(kAllLanes); }

// The lanes of the warp that hold the same value. Every lane must call it.
__device__ __forceinline__ uint32_t warp_match(int32_t value) { return __match_any_sync(kAllLanes, value); }

__device__ __forceinline__ void atomic_or(int32_t* address, int32_t bits) { atomicOr(address, bits); }

// The block's dynamic shared memory, cut into arrays. `take` the widest elements first: nothing is aligned further.
class SharedMemory {
 public:
  __device__ __forceinline__ SharedMemory() {
    extern __shared__ __align__(16) unsigned char specdec_shared_memory[];
    next_ = specdec_shared_memory;
  }
  template <class T>
  __device__ __forceinline__ T* take(int32_t count) {
    T* array = reinterpret_cast<T*>(next_);
    next_ += count * sizeof(T);
    return array;
  }

 private:
  unsigned char* next_;
};

// Several elements that are loaded and stored at once.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T element[kCount];
};

// Makes a device current for a scope: the tensors of a call may be on another GPU than the caller's current one.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t error_ = cudaSuccess;
};

// Starts a kernel on a device and stream. Returns the error of the launch alone: nothing waits for the kernel.
template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, int device, cudaStream_t stream,
                   const Params& params) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  kernel<<<grid, block, shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace specdec

// Every device intrinsic and every part of the CUDA runtime that the kernels use, behind one name each.
//
// A kernel file includes this header and params.h, and nothing of CUDA. nvcc takes the names from here: intrinsics, or
// PTX where CUDA has no intrinsic. With SPECDEC_EMULATED a C++ compiler takes them from the tests' emulator, which runs
// the same kernels on a CPU and reports what they do wrong (tests/emulator). What is below is the only CUDA code that
// the emulator can't run, so it is kept free of ideas.
//
// What depends on the architecture is not there where SPECDEC_EVERY_ARCH is defined: setup.py defines it for sources
// that it compiles to PTX once, for all of them.
//
// Rules for kernels: no raw intrinsics, no raw __shared__, no return before a barrier, no two barriers on one line, no
// `<<<>>>`.
#pragma once

#include <cstddef>
#include <cstdint>

namespace specdec::cuda {

constexpr int kWarpSize = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

// Several elements that are loaded and stored at once.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T element[kCount];
};

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

// An 8-bit float with 4 bits of exponent and 3 of mantissa, e4m3fn.
struct Float8 {
  uint8_t bits;
};

}  // namespace specdec::cuda

#ifdef SPECDEC_EMULATED
#include <emulated_device.h>
#endif

#ifndef SPECDEC_EMULATED
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace specdec::cuda {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

// Numbers

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(BFloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(Float16 value) { return __half2float(value); }

__device__ __forceinline__ float float16_bits_to_float(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

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

// Two 16-bit floats in one register, the first in the low half, as matrix instructions take them.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_pair<BFloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
__device__ __forceinline__ uint32_t pack_pair<Float16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Four e4m3 numbers as two pairs of 16-bit floats, exactly. Where no instruction does it, the bits move to the place
// that a 16-bit float has for them, and a product puts the exponent right. That product makes 480 of the code for NaN.
// So it is multiplied once more, by what makes 480 infinite and leaves 448, the greatest number, finite; and 0 times
// that is added to it.
template <class T>
__device__ __forceinline__ void widen_float8(uint32_t four, uint32_t& first, uint32_t& second);
template <>
__device__ __forceinline__ void widen_float8<BFloat16>(uint32_t four, uint32_t& first, uint32_t& second) {
  const uint32_t high[2] = {__byte_perm(four, 0, 0x1404), __byte_perm(four, 0, 0x3424)};
  uint32_t* const pairs[2] = {&first, &second};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t bits = (high[i] & 0x80008000u) | (high[i] >> 4 & 0x07f007f0u);
    uint32_t wide, beyond;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(wide) : "r"(bits), "r"(0x7b807b80u), "r"(0x80008000u));
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(beyond) : "r"(wide), "r"(0x7b0e7b0eu), "r"(0x80008000u));
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(*pairs[i]) : "r"(beyond), "r"(0u), "r"(wide));
  }
}
#ifndef SPECDEC_EVERY_ARCH
template <>
__device__ __forceinline__ void widen_float8<Float16>(uint32_t four, uint32_t& first, uint32_t& second) {
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ >= 900 || (__CUDA_ARCH__ == 890 && CUDART_VERSION >= 12010))
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.rn.f16x2.e4m3x2 %0, low; cvt.rn.f16x2.e4m3x2 %1, high; }"
      : "=r"(first), "=r"(second)
      : "r"(four));
#else
  const uint32_t high[2] = {__byte_perm(four, 0, 0x1404), __byte_perm(four, 0, 0x3424)};
  uint32_t* const pairs[2] = {&first, &second};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t bits = (high[i] & 0x80008000u) | (high[i] >> 1 & 0x3f803f80u);
    uint32_t wide, beyond;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(wide) : "r"(bits), "r"(0x5c005c00u));
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(beyond) : "r"(wide), "r"(0x58605860u));
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(*pairs[i]) : "r"(beyond), "r"(0u), "r"(wide));
  }
#endif
}
#endif

// Four signed bytes as two pairs of 16-bit floats, exactly: with their signs turned they are the last bits of the
// numbers from 1024 to 1279.
template <class T>
__device__ __forceinline__ void widen_int8(uint32_t four, uint32_t& first, uint32_t& second);
template <>
__device__ __forceinline__ void widen_int8<Float16>(uint32_t four, uint32_t& first, uint32_t& second) {
  const uint32_t turned = four ^ 0x80808080u;
  const uint32_t pairs[2] = {__byte_perm(turned, 0x64646464u, 0x4140), __byte_perm(turned, 0x64646464u, 0x4342)};
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(first) : "r"(pairs[0]), "r"(0x64806480u));
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(second) : "r"(pairs[1]), "r"(0x64806480u));
}

__device__ __forceinline__ uint32_t bits_of(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ float negative_infinity() { return -__int_as_float(0x7f800000); }
__device__ __forceinline__ int popcount(uint64_t bits) { return __popcll(bits); }
__device__ __forceinline__ int lowest_bit(uint32_t bits) { return __ffs(bits) - 1; }  // -1 for none

// A product that is rounded before anything is added to it: the compiler would make one fma of the two.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }

// 2^x to about 2 ulp; subnormal results are 0.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Barriers and fences

__device__ __forceinline__ void block_sync() { __syncthreads(); }
__device__ __forceinline__ void warp_sync(uint32_t lanes = kAllLanes) { __syncwarp(lanes); }
// A barrier of its own, 1 to 15, for `threads` threads: whole warps of the block, which may come from different lines.
template <int kBarrier>
__device__ __forceinline__ void group_sync(int threads) {
  asm volatile("barrier.sync %0, %1;" ::"n"(kBarrier), "r"(threads) : "memory");
}

// Orders this thread's accesses to global memory before and after it, as seen by the other blocks.
__device__ __forceinline__ void device_fence() { __threadfence(); }

// Warp collectives: every lane that `lanes` names must make the same call. Shuffles take 4 or 8 bytes.

template <class T>
__device__ __forceinline__ T warp_shuffle(T value, int from_lane, uint32_t lanes = kAllLanes) {
  return __shfl_sync(lanes, value, from_lane);
}
template <class T>
__device__ __forceinline__ T warp_shuffle_xor(T value, int lane_bits, uint32_t lanes = kAllLanes) {
  return __shfl_xor_sync(lanes, value, lane_bits);
}
__device__ __forceinline__ uint32_t warp_ballot(bool vote, uint32_t lanes = kAllLanes) {
  return __ballot_sync(lanes, vote);
}
// The lanes that hold the same value.
__device__ __forceinline__ uint32_t warp_match(int32_t value, uint32_t lanes = kAllLanes) {
  return __match_any_sync(lanes, value);
}

// Atomics. They order nothing but themselves; a device_fence goes with those that hand data to another block.

__device__ __forceinline__ void atomic_or(int32_t* address, int32_t bits) { atomicOr(address, bits); }
template <class T>
__device__ __forceinline__ T atomic_add(T* address, T value) {
  return atomicAdd(address, value);
}

// 16 bytes of global memory, aligned to 16, at once.

__device__ __forceinline__ Bytes16 load_16(const void* address) {
  const uint4 words = *static_cast<const uint4*>(address);
  return {{words.x, words.y, words.z, words.w}};
}
__device__ __forceinline__ void store_16(void* address, Bytes16 bytes) {
  *static_cast<uint4*>(address) = make_uint4(bytes.word[0], bytes.word[1], bytes.word[2], bytes.word[3]);
}

// Asynchronous copies from global to shared memory, 16 aligned bytes each. They land at the wait that covers their
// group; before it the destination holds nothing. Every thread waits for its own copies, so a barrier must follow.

__device__ __forceinline__ uint32_t shared_address(const void* address) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(address));
}
// Reads source_bytes (0 to 16) and fills up with zeros. With 0 the source may be any aligned address.
__device__ __forceinline__ void cp_async_16(void* to_shared, const void* from_global, uint32_t source_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to_shared)), "l"(from_global),
               "r"(source_bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kGroups of this thread's newest groups are under way.
template <int kGroups>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Matrix instructions on 16-bit floats. All 32 lanes take part.

// Four 8x8 matrices: lane 8 * i + r names row r (16 aligned bytes) of matrix i; lane l gets elements 2 * (l % 4) and
// the next one of row l / 4 of each. `trans` gets them of column l / 4.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&fragments)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&fragments)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
               : "r"(shared_address(row))
               : "memory");
}

// sum [16, 8] += a [16, 16] * b [16, 8], summed in float32.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma_m16n8k16<BFloat16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                                       uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<Float16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                                      uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Shared memory

// Whether a multiprocessor has 228 KiB of it.
#ifndef SPECDEC_EVERY_ARCH
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ / 100 == 9 || __CUDA_ARCH__ / 100 == 10)
constexpr bool kLargeSharedMemory = true;
#else
constexpr bool kLargeSharedMemory = false;
#endif
#endif

// An array (or one value, with nothing for `dimensions`) in static shared memory: SPECDEC_SHARED(float, sums, [4][32]);
#define SPECDEC_SHARED(type, name, dimensions) __shared__ __align__(16) type name dimensions

// The block's dynamic shared memory, cut into arrays, each aligned to 16 bytes. The launch asks for the sum of their
// `bytes`. All threads take the same arrays, and reach one array through its own pointer only.
class SharedMemory {
 public:
  __device__ __forceinline__ SharedMemory() {
    extern __shared__ __align__(128) unsigned char specdec_shared_memory[];
    next_ = specdec_shared_memory;
  }
  template <class T>
  __device__ __forceinline__ T* take(int32_t count) {
    T* array = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(count);
    return array;
  }
  template <class T>
  __host__ __device__ static constexpr uint32_t bytes(int32_t count) {
    return (uint32_t(count) * uint32_t(sizeof(T)) + 15u) & ~15u;
  }

 private:
  unsigned char* next_;
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

// Shared memory that a block of this device may have if it asks, or 0 for a device that can't be asked.
inline size_t shared_bytes_per_block(int device) {
  int bytes = 0;
  return cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess ? bytes : 0;
}

constexpr size_t kSharedBytesWithoutAsking = 48 * 1024;

// Lets a kernel have so much dynamic shared memory on the current device; the driver is asked where it has not been.
cudaError_t allow_shared_bytes(const void* kernel, int device, size_t bytes);

// Starts a kernel on a device and stream. Returns the error of the launch alone: nothing waits for the kernel.
template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, int device, cudaStream_t stream,
                   const Params& params) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  if (shared_bytes > kSharedBytesWithoutAsking) {
    const cudaError_t error = allow_shared_bytes(reinterpret_cast<const void*>(kernel), device, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace specdec::cuda

#endif

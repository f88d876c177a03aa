// What the names of csrc/common/cuda/device.cuh do, in a program that the emulator and a GPU can both run: the proof that
// the emulator means what the GPU means. 0 if every value is right.
//
// The layouts of ldmatrix and mma are the formulas of CUTLASS (mma_traits_sm80.hpp, copy_traits_sm75.hpp), an author
// other than the emulator's.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <initializer_list>

#include "common/cuda/device.cuh"

using namespace specdec;
using namespace specdec::cuda;

namespace {

constexpr int kWarps = 2, kThreads = kWarps * kWarpSize;

struct ProductParams {
  const float *a, *b;  // a at m + 16 * k, b at n + 8 * k
  float* sum;          // at m + 16 * n
};

template <class T>
__global__ void product_kernel(ProductParams p) {
  const int column = threadIdx.x % 4, row = threadIdx.x / 4;
  uint32_t a[4], b[2];
  float sum[4];
  for (int i = 0; i < 4; ++i) {
    const int place = column * 32 + row + i % 2 * 8 + i / 2 * 128;
    a[i] = pack_pair<T>(p.a[place], p.a[place + 16]);
  }
  for (int i = 0; i < 2; ++i) {
    const int place = column * 16 + row + i * 64;
    b[i] = pack_pair<T>(p.b[place], p.b[place + 8]);
  }
  const int place = column * 32 + row;
  for (int i = 0; i < 4; ++i) sum[i] = p.sum[place + i % 2 * 16 + i / 2 * 8];
  mma_m16n8k16<T>(sum, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) p.sum[place + i % 2 * 16 + i / 2 * 8] = sum[i];
}

struct WrongParams {
  int32_t* wrong;
  const unsigned char* bytes;  // [16 * kThreads], aligned to 16; byte i is i % 251
  unsigned char* copy;         // like it
};

__device__ void expect(const WrongParams& p, bool right) {
  if (!right) atomic_add(p.wrong, 1);
}

__global__ void matrix_kernel(WrongParams p) {
  SPECDEC_SHARED(uint16_t, elements, [256]);
  const int lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) elements[lane * 8 + i] = uint16_t(lane * 8 + i);
  block_sync();
  uint32_t fragments[4];
  ldmatrix_x4(fragments, elements + lane * 8);
  for (int i = 0; i < 4; ++i) {
    const uint32_t element = lane * 2 + i * 64;
    expect(p, fragments[i] == (element | (element + 1) << 16));
  }
  ldmatrix_x4_trans(fragments, elements + lane * 8);
  for (int i = 0; i < 4; ++i) {
    const uint32_t element = lane % 4 * 16 + lane / 4 + i * 64;
    expect(p, fragments[i] == (element | (element + 8) << 16));
  }
}

// Whole copies, partial ones and none, in two groups.
__global__ void copy_kernel(WrongParams p) {
  SharedMemory memory;
  unsigned char* first = memory.take<unsigned char>(16 * kThreads);
  unsigned char* second = memory.take<unsigned char>(16 * kThreads);
  const int thread = threadIdx.x, taken = thread % 17;
  cp_async_16(first + 16 * thread, p.bytes + 16 * thread);
  cp_async_commit();
  cp_async_16(second + 16 * thread, p.bytes + 16 * thread, taken);
  cp_async_commit();
  cp_async_wait<1>();
  block_sync();
  const int other = (thread + 40) % kThreads;
  for (int i = 0; i < 16; ++i) expect(p, first[16 * other + i] == (16 * other + i) % 251);
  cp_async_wait<0>();
  block_sync();
  for (int i = 0; i < 16; ++i) {
    expect(p, second[16 * other + i] == (i < other % 17 ? (16 * other + i) % 251 : 0));
  }
  store_16(p.copy + 16 * thread, load_16(p.bytes + 16 * thread));
}

__global__ void warp_kernel(WrongParams p) {
  const int thread = threadIdx.x, lane = thread % kWarpSize, warp_start = thread - lane;
  expect(p, warp_shuffle(thread, lane + 1) == warp_start + (lane + 1) % kWarpSize);
  expect(p, warp_shuffle(double(thread), 5) == warp_start + 5);
  expect(p, warp_shuffle_xor(float(thread), 8) == float(thread ^ 8));
  expect(p, warp_ballot(lane % 4 == 0) == 0x11111111u);
  expect(p, warp_match(lane % 4) == 0x11111111u << lane % 4);
  if (lane % 2 == 0) {
    expect(p, warp_shuffle_xor(thread, 6, 0x55555555u) == (thread ^ 6));
    expect(p, warp_ballot(lane < 8, 0x55555555u) == 0x55u);
    expect(p, warp_match(lane / 8, 0x55555555u) == 0x55u << lane / 8 * 8);
  }
  warp_sync();
  // One warp at a barrier of its own, and both at one from two lines.
  SPECDEC_SHARED(int32_t, handed, [2]);
  if (warp_start == 0) {
    if (lane == 0) handed[0] = 41;
    group_sync<1>(kThreads);
    group_sync<2>(kThreads);
    expect(p, handed[1] == 42);
  } else {
    group_sync<1>(kThreads);
    if (lane == 31) handed[1] = handed[0] + 1;
    group_sync<3>(kWarpSize);
    expect(p, handed[1] == 42);
    group_sync<2>(kThreads);
  }
  expect(p, popcount(0xf00000000000000full) == 8 && lowest_bit(24) == 3 && lowest_bit(0) == -1);
}

__global__ void number_kernel(WrongParams p) {
  const float x = float(int(threadIdx.x) - 32) / 3;
  const float right = exp2f(x);
  expect(p, fabsf(fast_exp2(x) - right) <= 4e-7f * right);
  expect(p, fast_exp2(negative_infinity()) == 0.0f && fast_exp2(-140.0f) == 0.0f && fast_exp2(3.0f) == 8.0f);
  expect(p, float_of(bits_of(x)) == x && float16_bits_to_float(0xc100u) == -2.5f);
  expect(p, to_float(from_float<BFloat16>(1.00390625f)) == 1.0f && to_float(from_float<Float16>(2049.0f)) == 2048.0f);
  expect(p, pack_pair<BFloat16>(1.0f, -2.0f) == 0xc0003f80u && pack_pair<Float16>(1.0f, -2.0f) == 0xc0003c00u);
  SPECDEC_SHARED(int32_t, total, [2]);
  if (threadIdx.x < 2) total[threadIdx.x] = 0;
  block_sync();
  atomic_add(&total[0], int32_t(threadIdx.x));
  atomic_or(&total[1], 1 << threadIdx.x % 8);
  block_sync();
  expect(p, total[0] == kThreads * (kThreads - 1) / 2 && total[1] == 255);
}

// Every e4m3 number, four to a thread.
template <class T>
__global__ void float8_kernel(WrongParams p) {
  uint32_t four = 0, pairs[2];
  float right[4];
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t code = threadIdx.x * 4 + i, exponent = code >> 3 & 15, mantissa = code & 7;
    const float magnitude = exponent == 0 ? ldexpf(mantissa, -9) : ldexpf(8 + mantissa, int(exponent) - 10);
    right[i] = code >= 128 ? -magnitude : magnitude;
    four |= code << 8 * i;
  }
  widen_float8<T>(four, pairs[0], pairs[1]);
  expect(p, pairs[0] == pack_pair<T>(right[0], right[1]));
  expect(p, pairs[1] << 16 == pack_pair<T>(0.0f, right[2]));
  if (threadIdx.x % 32 != 31) {
    expect(p, pairs[1] == pack_pair<T>(right[2], right[3]));
  } else {  // codes 127 and 255
    const uint32_t infinity = pack_pair<T>(0.0f, -negative_infinity());
    expect(p, (pairs[1] & 0x7fff0000u) > infinity);
  }
}

// Every int8 number, four to a thread.
__global__ void int8_kernel(WrongParams p) {
  uint32_t four = 0, pairs[2];
  float right[4];
  for (int i = 0; i < 4; ++i) {
    const int code = int(threadIdx.x) * 4 + i;
    right[i] = float(code - 128);
    four |= uint32_t((code - 128) & 255) << 8 * i;
  }
  widen_int8<Float16>(four, pairs[0], pairs[1]);
  expect(p, pairs[0] == pack_pair<Float16>(right[0], right[1]) && pairs[1] == pack_pair<Float16>(right[2], right[3]));
}

// Memory that host and device can use.
template <class T>
T* shared_with_device(int count) {
  void* memory = nullptr;
  if (cudaMallocManaged(&memory, count * sizeof(T)) != cudaSuccess) return nullptr;
  return static_cast<T*>(memory);
}

template <class Params>
bool runs(void (*kernel)(Params), int threads, size_t shared_bytes, const Params& params) {
  const cudaError_t error = launch(kernel, dim3(1), dim3(threads), shared_bytes, 0, nullptr, params);
  return error == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess;
}

template <class T>
int wrong_products() {
  float *a = shared_with_device<float>(256), *b = shared_with_device<float>(128), *sum = shared_with_device<float>(128);
  float right[128];
  for (int i = 0; i < 256; ++i) a[i] = float(i * 7 % 31 - 15);
  for (int i = 0; i < 128; ++i) b[i] = float(i * 5 % 29 - 14), sum[i] = right[i] = float(i);
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      for (int k = 0; k < 16; ++k) right[m + 16 * n] += a[m + 16 * k] * b[n + 8 * k];
    }
  }
  if (!runs(product_kernel<T>, kWarpSize, 0, ProductParams{a, b, sum})) return 128;
  int wrong = 0;
  for (int i = 0; i < 128; ++i) wrong += sum[i] != right[i];
  for (float* array : {a, b, sum}) cudaFree(array);
  return wrong;
}

}  // namespace

int main() {
  auto* wrong = shared_with_device<int32_t>(1);
  auto* bytes = shared_with_device<unsigned char>(16 * kThreads);
  auto* copy = shared_with_device<unsigned char>(16 * kThreads);
  if (wrong == nullptr || bytes == nullptr || copy == nullptr) {
    std::printf("no memory\n");
    return 2;
  }
  *wrong = 0;
  for (int i = 0; i < 16 * kThreads; ++i) bytes[i] = static_cast<unsigned char>(i % 251);
  const WrongParams params{wrong, bytes, copy};
  const size_t copies = 2 * SharedMemory::bytes<unsigned char>(16 * kThreads);
  const bool all_run = runs(matrix_kernel, kWarpSize, 0, params) && runs(copy_kernel, kThreads, copies, params) &&
                       runs(warp_kernel, kThreads, 0, params) && runs(number_kernel, kThreads, 0, params) &&
                       runs(float8_kernel<BFloat16>, kThreads, 0, params) &&
                       runs(float8_kernel<Float16>, kThreads, 0, params) && runs(int8_kernel, kThreads, 0, params);
  for (int i = 0; i < 16 * kThreads; ++i) *wrong += copy[i] != bytes[i];
  *wrong += wrong_products<BFloat16>() + wrong_products<Float16>();
  const bool right = all_run && *wrong == 0;
  std::printf("%s, %d values are wrong\n", all_run ? "all kernels ran" : "a kernel did not run", *wrong);
  cudaFree(wrong);
  cudaFree(bytes);
  cudaFree(copy);
  return right ? 0 : 1;
}

// The emulator's side of csrc/common/cuda/device.cuh: the same names, with the meaning that PTX gives them.
//
// Whatever touches the kernel's memory is done here, in the thread that asked for it, and not in the emulator, which is
// compiled without ThreadSanitizer: so an error is blamed on the right thread and line.
#pragma once

#include "emulator.h"

namespace specdec::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) { return float_of(uint32_t(value.bits) << 16); }
inline float to_float(Float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | rest << 13);
  const float magnitude = float_of(rest << 13) * 0x1p112f;  // exact, for subnormal numbers too
  return float_of(sign | bits_of(magnitude));
}

inline float float16_bits_to_float(uint32_t bits) { return to_float(Float16{uint16_t(bits)}); }

template <class T>
inline T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = bits_of(value);
  if (value != value) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Float16 from_float<Float16>(float value) {
  const uint16_t sign = uint16_t(bits_of(value) >> 16 & 0x8000);
  const float magnitude = std::fabs(value);
  if (value != value) return {0x7fff};
  if (magnitude >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  if (magnitude < 0x1p-14f) return {uint16_t(sign | uint16_t(std::nearbyint(magnitude * 0x1p24f)))};
  const uint32_t bits = bits_of(magnitude) - (112u << 23);
  return {uint16_t(sign | ((bits + 0xfff + (bits >> 13 & 1)) >> 13))};
}

template <class T>
inline uint32_t pack_pair(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}

inline float to_float(Float8 value) {
  const int exponent = value.bits >> 3 & 15, mantissa = value.bits & 7;
  if (exponent == 15 && mantissa == 7) return NAN;
  const float magnitude =
      exponent == 0 ? std::ldexp(float(mantissa), -9) : std::ldexp(float(8 + mantissa), exponent - 10);
  return value.bits & 0x80 ? -magnitude : magnitude;
}
template <class T>
inline void widen_float8(uint32_t four, uint32_t& first, uint32_t& second) {
  float wide[4];
  for (int i = 0; i < 4; ++i) wide[i] = to_float(Float8{uint8_t(four >> 8 * i)});
  first = pack_pair<T>(wide[0], wide[1]);
  second = pack_pair<T>(wide[2], wide[3]);
}

template <class T>
inline void widen_int8(uint32_t four, uint32_t& first, uint32_t& second) {
  float wide[4];
  for (int i = 0; i < 4; ++i) wide[i] = float(int8_t(uint8_t(four >> 8 * i)));
  first = pack_pair<T>(wide[0], wide[1]);
  second = pack_pair<T>(wide[2], wide[3]);
}

inline float negative_infinity() { return -INFINITY; }
inline int popcount(uint64_t bits) { return __builtin_popcountll(bits); }
inline int lowest_bit(uint32_t bits) { return __builtin_ffs(int(bits)) - 1; }
inline float rounded_product(float a, float b) {
  const volatile float product = a * b;
  return product;
}
inline float fast_exp2(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

inline void block_sync(emulator::Site site = SPECDEC_HERE) { emulator::block_sync(site); }
template <int kBarrier>
inline void group_sync(int threads, emulator::Site site = SPECDEC_HERE) {
  emulator::group_sync(kBarrier, threads, site);
}
#ifndef SPECDEC_WITHOUT_FENCES  // which a test expects to be found out
inline void device_fence() { emulator::device_fence(); }
#else
inline void device_fence() {}
#endif
inline void warp_sync(uint32_t lanes = kAllLanes, emulator::Site site = SPECDEC_HERE) {
  emulator::Payload payload = {};
  emulator::warp_collective(emulator::Collective::kSync, lanes, payload, site);
}

inline uint32_t lane_index() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % kWarpSize;
}

template <class T>
inline T warp_shuffle(T value, int from_lane, uint32_t lanes = kAllLanes, emulator::Site site = SPECDEC_HERE) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  emulator::Payload payload = {};
  std::memcpy(payload.in, &value, sizeof value);
  payload.from_lane = uint32_t(from_lane) % kWarpSize;
  emulator::warp_collective(emulator::Collective::kShuffle, lanes, payload, site);
  std::memcpy(&value, payload.out, sizeof value);
  return value;
}
template <class T>
inline T warp_shuffle_xor(T value, int lane_bits, uint32_t lanes = kAllLanes, emulator::Site site = SPECDEC_HERE) {
  return warp_shuffle(value, int(lane_index()) ^ lane_bits, lanes, site);
}
inline uint32_t warp_ballot(bool vote, uint32_t lanes = kAllLanes, emulator::Site site = SPECDEC_HERE) {
  emulator::Payload payload = {};
  payload.in[0] = vote;
  emulator::warp_collective(emulator::Collective::kBallot, lanes, payload, site);
  return payload.out[0];
}
inline uint32_t warp_match(int32_t value, uint32_t lanes = kAllLanes, emulator::Site site = SPECDEC_HERE) {
  emulator::Payload payload = {};
  payload.in[0] = uint32_t(value);
  emulator::warp_collective(emulator::Collective::kMatch, lanes, payload, site);
  return payload.out[0];
}

inline void atomic_or(int32_t* address, int32_t bits) { __atomic_fetch_or(address, bits, __ATOMIC_RELAXED); }
template <class T>
inline T atomic_add(T* address, T value) {
  if constexpr (std::is_integral_v<T>) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
  } else {
    T old, sum;
    __atomic_load(address, &old, __ATOMIC_RELAXED);
    do {
      sum = old + value;
    } while (!__atomic_compare_exchange(address, &old, &sum, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
  }
}

inline void check_aligned(const void* address, const char* what, emulator::Site site) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) emulator::fail(site, "%s is not aligned to 16 bytes", what);
}
inline Bytes16 load_16(const void* address, emulator::Site site = SPECDEC_HERE) {
  check_aligned(address, "the address of load_16", site);
  return *static_cast<const Bytes16*>(address);
}
inline void store_16(void* address, Bytes16 bytes, emulator::Site site = SPECDEC_HERE) {
  check_aligned(address, "the address of store_16", site);
  *static_cast<Bytes16*>(address) = bytes;
}

inline void cp_async_16(void* to_shared, const void* from_global, uint32_t source_bytes = 16,
                        emulator::Site site = SPECDEC_HERE) {
  emulator::check_in_shared(to_shared, 16, "the destination of cp_async_16", site);
  check_aligned(from_global, "the source of cp_async_16", site);
  if (source_bytes > 16) emulator::fail(site, "cp_async_16 copies at most 16 bytes, not %u", source_bytes);
  // A bad source is found here, and not in the wait. The destination holds neither old nor new bytes until then.
  const volatile unsigned char* from = static_cast<const volatile unsigned char*>(from_global);
  for (uint32_t i = 0; i < source_bytes; ++i) static_cast<void>(from[i]);
  volatile unsigned char* to = static_cast<volatile unsigned char*>(to_shared);
  for (int i = 0; i < 16; ++i) to[i] = 0xff;
  SPECDEC_POISON(to_shared, 16);
  emulator::copy_issued({to_shared, from_global, source_bytes, site});
}
inline void cp_async_commit() { emulator::copies_committed(); }
template <int kGroups>
inline void cp_async_wait() {
  emulator::AsyncCopy copy;
  while (emulator::next_copy_to_finish(kGroups, copy)) {
    SPECDEC_UNPOISON(copy.to, 16);
    auto* to = static_cast<unsigned char*>(copy.to);
    std::memcpy(to, copy.from, copy.source_bytes);
    std::memset(to + copy.source_bytes, 0, 16 - copy.source_bytes);
  }
}

inline void load_matrix(emulator::Collective collective, uint32_t (&fragments)[4], const void* row,
                        emulator::Site site) {
  emulator::Payload payload = {};
  emulator::check_in_shared(row, 16, "a row of ldmatrix", site);
  const auto* elements = static_cast<const uint16_t*>(row);
  for (int i = 0; i < 4; ++i) payload.in[i] = elements[2 * i] | uint32_t(elements[2 * i + 1]) << 16;
  emulator::warp_collective(collective, kAllLanes, payload, site);
  std::memcpy(fragments, payload.out, sizeof fragments);
}
inline void ldmatrix_x4(uint32_t (&fragments)[4], const void* row, emulator::Site site = SPECDEC_HERE) {
  load_matrix(emulator::Collective::kLoadMatrix, fragments, row, site);
}
inline void ldmatrix_x4_trans(uint32_t (&fragments)[4], const void* row, emulator::Site site = SPECDEC_HERE) {
  load_matrix(emulator::Collective::kLoadMatrixTransposed, fragments, row, site);
}
template <class T>
inline void mma_m16n8k16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         emulator::Site site = SPECDEC_HERE) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>);
  emulator::Payload payload = {};
  std::memcpy(payload.in, a, sizeof a);
  payload.in[4] = b0;
  payload.in[5] = b1;
  std::memcpy(payload.in + 6, sum, sizeof sum);
  constexpr bool kBFloat16 = std::is_same_v<T, BFloat16>;
  emulator::warp_collective(
      kBFloat16 ? emulator::Collective::kMultiplyBFloat16 : emulator::Collective::kMultiplyFloat16, kAllLanes, payload,
      site);
  std::memcpy(sum, payload.out, sizeof sum);
}

constexpr bool kLargeSharedMemory = false;

#define SPECDEC_SHARED(type, name, dimensions)     \
  using SharedTypeOf_##name = type dimensions;     \
  static const char shared_key_of_##name = 0;      \
  auto& name = *static_cast<SharedTypeOf_##name*>( \
      ::specdec::emulator::shared_static(&shared_key_of_##name, sizeof(SharedTypeOf_##name)))

class SharedMemory {
 public:
  template <class T>
  T* take(int32_t count, emulator::Site site = SPECDEC_HERE) {
    void* array = emulator::shared_dynamic(arrays_++, offset_, count * sizeof(T), site);
    offset_ += bytes<T>(count);
    return static_cast<T*>(array);
  }
  template <class T>
  static constexpr uint32_t bytes(int32_t count) {
    return (uint32_t(count) * uint32_t(sizeof(T)) + 15u) & ~15u;
  }

 private:
  int arrays_ = 0;
  uint32_t offset_ = 0;
};

inline size_t shared_bytes_per_block(int) { return emulator::shared_bytes_per_block(); }

// An error in the kernel is thrown. What is returned are the errors that CUDA would return.
template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, int, cudaStream_t,
                   const Params& params) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking) {
    const cudaError_t error = emulator::allow_shared_bytes(reinterpret_cast<const void*>(kernel), shared_bytes);
    if (error != cudaSuccess) return error;
  }
  auto body = [&] { kernel(params); };
  using Body = decltype(body);
  return emulator::run(grid, block, shared_bytes, [](void* body) { (*static_cast<Body*>(body))(); }, &body);
}

}  // namespace specdec::cuda

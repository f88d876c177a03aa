// A layer's K or V on a GPU, cut into columns: one unit of 16, 4, 2 or 1 bytes of a head, in every slot. A thread that
// owns a column is the only one to read or write it in all slots of a request, so it needs no barrier.
//
// Units are as large as all addresses, strides and sizes of a launch allow. Rows of a head are at multiples of 16 bytes
// in every engine, and then a warp moves 512 bytes that lie side by side.
#pragma once

#include "common/cuda/device.cuh"
#include "kv/places.h"

namespace specdec::cuda {

template <int kBytes>
struct CacheUnit;
template <>
struct CacheUnit<16> {
  using Bits = Bytes16;
  __device__ __forceinline__ static Bits load(const char* from) { return load_16(from); }
  __device__ __forceinline__ static void store(char* to, Bits bits) { store_16(to, bits); }
};
template <class T>
struct SmallCacheUnit {
  using Bits = T;
  __device__ __forceinline__ static Bits load(const char* from) { return *reinterpret_cast<const T*>(from); }
  __device__ __forceinline__ static void store(char* to, Bits bits) { *reinterpret_cast<T*>(to) = bits; }
};
template <>
struct CacheUnit<4> : SmallCacheUnit<uint32_t> {};
template <>
struct CacheUnit<2> : SmallCacheUnit<uint16_t> {};
template <>
struct CacheUnit<1> : SmallCacheUnit<uint8_t> {};

// K or V of a layer.
struct CachePlane {
  char* cache;
  int64_t stride_first, stride_slot, stride_head;
  int32_t head_bytes;

  __device__ __forceinline__ CachePlane(const KvCacheLayer& l, bool is_v)
      : cache(static_cast<char*>(is_v ? l.v_cache : l.k_cache)),
        stride_first(is_v ? l.v_stride_first : l.k_stride_first),
        stride_slot(is_v ? l.v_stride_slot : l.k_stride_slot),
        stride_head(is_v ? l.v_stride_head : l.k_stride_head),
        head_bytes(is_v ? l.v_bytes : l.k_bytes) {}

  // Where a unit of a row lies, counted from the row's start.
  template <int kBytes>
  __device__ __forceinline__ int64_t offset(int64_t unit) const {
    const int32_t units = head_bytes / kBytes;
    return unit / units * stride_head + unit % units * kBytes;
  }
  __device__ __forceinline__ char* at(KvCachePlace place) const {
    return cache + place.first * stride_first + place.slot * stride_slot;
  }
};

// The bits that are set in some address, stride or size of the layers: what is 0 in all of them they are multiples of.
inline uintptr_t bits_in_use(const KvCacheLayer* layers, int32_t count) {
  uintptr_t bits = 0;
  for (const KvCacheLayer* l = layers; l < layers + count; ++l) {
    bits |= reinterpret_cast<uintptr_t>(l->k_cache) | reinterpret_cast<uintptr_t>(l->v_cache);
    bits |= uintptr_t(l->k_stride_first | l->k_stride_slot | l->k_stride_head | l->k_bytes);
    bits |= uintptr_t(l->v_stride_first | l->v_stride_slot | l->v_stride_head | l->v_bytes);
  }
  return bits;
}

inline int32_t unit_bytes(uintptr_t bits) { return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : bits % 2 == 0 ? 2 : 1; }

// Bytes of a slot, of whichever of K and V has more, in whichever layer has most.
inline int64_t longest_row(const KvCacheLayer* layers, int32_t count) {
  int64_t longest = 0;
  for (const KvCacheLayer* l = layers; l < layers + count; ++l) {
    const int64_t bytes = int64_t(l->kv_heads) * (l->k_bytes > l->v_bytes ? l->k_bytes : l->v_bytes);
    if (bytes > longest) longest = bytes;
  }
  return longest;
}

}  // namespace specdec::cuda

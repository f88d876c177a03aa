// Which scores of a request are the best, by (score falling, index rising), without sorting them.
//
// A radix selection: four passes over the keys, a byte of them each from the top, find the key of the last one that is
// wanted, and how many of its equals are. Then one more pass in the order of the index gives each chosen one its place.
// Keys are read again in every pass instead of kept, so any number of them needs 1 KiB for the histogram and no more;
// a pool of 710 candidates lies in the first cache, and 256 threads have three of them each. The lanes of a warp that
// hold the same byte find each other first, since scores are alike in their top bytes and atomics on one address would
// go one by one.
#pragma once

#include "common/cuda/block_team.cuh"
#include "common/cuda/device.cuh"

namespace specdec::cuda {

constexpr int kBestThreads = 256;  // one for each value of a byte

struct BestMemory {
  uint32_t* slots;     // [TeamReducer::kWords]
  int32_t* histogram;  // [256]
  uint32_t* chosen;    // [2] the byte, and how many are wanted among those that have it
};

// What is chosen: all keys above `key`, and among those equal to it the `equals` lowest indices.
struct Cut {
  uint32_t key;
  int32_t equals, found;  // how many that makes, at most as many as wanted
};

__device__ __forceinline__ bool fits(uint32_t key, uint32_t prefix, int shift) {
  return key != 0 && (uint64_t{key} >> (shift + 8)) == prefix;
}

// How many of the keys that go on as `prefix` have which byte at `shift`.
template <class KeyOf>
__device__ void count_bytes(const BestMemory& memory, int32_t count, uint32_t prefix, int shift, KeyOf key_of) {
  const int32_t thread = threadIdx.x, lane = thread % kWarpSize;
  memory.histogram[thread] = 0;
  block_sync();
  for (int32_t start = 0; start < count; start += kBestThreads) {
    const int32_t index = start + thread;
    const uint32_t key = index < count ? key_of(index) : 0;
    const bool counts = fits(key, prefix, shift);
    const int32_t byte = counts ? int32_t(key >> shift & 255u) : -1;
    const uint32_t alike = warp_match(byte);
    if (counts && lowest_bit(alike) == lane) atomic_add(&memory.histogram[byte], int32_t(popcount(alike)));
  }
  block_sync();
}

// `key_of(index)` is greater for what is better, and 0 for what can't be chosen. Each thread asks it for the same
// indices every time: thread, thread + 256, and so on. Called by all threads of a block of 256.
template <class KeyOf>
__device__ Cut find_cut(TeamReducer& reduce, const BestMemory& memory, int32_t count, int32_t wanted, KeyOf key_of) {
  if (wanted == 0) return {0xffffffffu, 0, 0};
  uint32_t prefix = 0;
  int32_t left = wanted;
  for (int shift = 24; shift >= 0; shift -= 8) {
    count_bytes(memory, count, prefix, shift, key_of);
    // Thread t sums up the bytes above 255 - t.
    const int32_t byte = kBestThreads - 1 - int32_t(threadIdx.x), alike = memory.histogram[byte];
    uint64_t before, total;
    reduce.scan(uint64_t(alike), before, total);
    if (shift == 24 && total <= uint64_t(wanted)) return {0, 0, int32_t(total)};  // all there are
    if (int64_t(before) < left && int64_t(before) + alike >= left) {
      memory.chosen[0] = uint32_t(byte);
      memory.chosen[1] = uint32_t(left - int32_t(before));
    }
    block_sync();
    prefix = prefix << 8 | memory.chosen[0];
    left = int32_t(memory.chosen[1]);
    block_sync();
  }
  return {prefix, left, wanted};
}

// Calls chosen(place, index) for what the cut leaves, places rising with the indices from 0 on.
template <class KeyOf, class Chosen>
__device__ void for_each_best(TeamReducer& reduce, const Cut& cut, int32_t count, KeyOf key_of, Chosen chosen) {
  uint64_t above = 0, equal = 0;  // so far
  for (int32_t start = 0; start < count; start += kBestThreads) {
    const int32_t index = start + int32_t(threadIdx.x);
    const uint32_t key = index < count ? key_of(index) : 0;
    const bool is_above = key > cut.key, is_equal = key == cut.key && key != 0;
    uint64_t before, total;
    reduce.scan(uint64_t{is_above} << 32 | uint64_t{is_equal}, before, total);
    const uint64_t equals_before = equal + uint32_t(before), limit = uint64_t(cut.equals);
    if (is_above || (is_equal && equals_before < limit)) {
      chosen(int32_t(above + (before >> 32) + (equals_before < limit ? equals_before : limit)), index);
    }
    above += total >> 32, equal += uint32_t(total);
  }
}

}  // namespace specdec::cuda

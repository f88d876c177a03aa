// What the threads of a team find out together: reductions and scans that give every thread the same result.
//
// A team is a block, or the block without its first warp; its threads meet at a named barrier. Everything here is
// called by all threads of the team, in the same order. A reduction goes through the lanes of each warp by shuffles and
// then through the warps in ascending order, so a sum of floats has one order and one value. Two slots in shared memory
// take turns, which saves the barrier behind the reading: before a slot is written again, every thread has passed the
// barrier of the reduction between, and so has read it.
#pragma once

#include <cstring>

#include "common/cuda/device.cuh"

namespace specdec::cuda {

constexpr int kTeamMaxThreads = 512;
constexpr int kTeamMaxWarps = kTeamMaxThreads / kWarpSize;
constexpr int kTeamBarrier = 1;

struct BlockTeam {
  int32_t rank, size;  // of this thread, and how many: whole warps, at most kTeamMaxThreads

  __device__ __forceinline__ void sync() const { group_sync<kTeamBarrier>(size); }
};

// A value as 32-bit words, for what moves words only.
template <class T>
struct WordsOf {
  static_assert(sizeof(T) % 4 == 0);
  static constexpr int kWords = sizeof(T) / 4;
  uint32_t word[kWords];

  __device__ explicit WordsOf(const T& value) { memcpy(word, &value, sizeof(T)); }
  __device__ T value() const {
    T result;
    memcpy(&result, word, sizeof(T));
    return result;
  }
};

template <class T>
__device__ __forceinline__ T from_lane_xor(const T& value, int lane_bits) {
  WordsOf<T> words(value);
#pragma unroll
  for (int i = 0; i < WordsOf<T>::kWords; ++i) words.word[i] = warp_shuffle_xor(words.word[i], lane_bits);
  return words.value();
}

class TeamReducer {
 public:
  static constexpr int kMaxWords = 8;
  static constexpr int kWords = 2 * kTeamMaxWarps * kMaxWords;  // of shared memory

  const BlockTeam team;

  __device__ TeamReducer(BlockTeam team, uint32_t* slots) : team(team), slots_(slots) {}

  // merge(a, b) of all threads' values. It must be associative up to rounding.
  template <class T, class Merge>
  __device__ T operator()(T value, Merge merge) {
    static_assert(WordsOf<T>::kWords <= kMaxWords);
#pragma unroll
    for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) value = merge(value, from_lane_xor(value, lanes));
    uint32_t* slot = slots_ + turn_ * (kTeamMaxWarps * kMaxWords);
    turn_ ^= 1;
    if (team.rank % kWarpSize == 0) put(slot, team.rank / kWarpSize, value);
    team.sync();
    T result = get<T>(slot, 0);
    for (int warp = 1; warp < team.size / kWarpSize; ++warp) result = merge(result, get<T>(slot, warp));
    return result;
  }

  __device__ float sum(float value) {
    return (*this)(value, [](float a, float b) { return a + b; });
  }
  __device__ uint64_t greatest(uint64_t value) {
    return (*this)(value, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
  }
  __device__ bool any(bool value) {
    return (*this)(uint32_t(value), [](uint32_t a, uint32_t b) { return a | b; }) != 0;
  }

  // The sum of the values of all threads before this one, and the sum of all.
  __device__ void scan(uint64_t value, uint64_t& before, uint64_t& total) {
    const int lane = team.rank % kWarpSize, own_warp = team.rank / kWarpSize;
    uint64_t up_to_here = value;
    for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
      const uint64_t other = warp_shuffle(up_to_here, lane - lanes);  // of any lane where there is none: not used
      if (lane >= lanes) up_to_here += other;
    }
    uint32_t* slot = slots_ + turn_ * (kTeamMaxWarps * kMaxWords);
    turn_ ^= 1;
    if (lane == kWarpSize - 1) put(slot, own_warp, up_to_here);
    team.sync();
    before = up_to_here - value;
    total = 0;
    for (int warp = 0; warp < team.size / kWarpSize; ++warp) {
      if (warp == own_warp) before += total;
      total += get<uint64_t>(slot, warp);
    }
  }

 private:
  template <class T>
  __device__ static void put(uint32_t* slot, int warp, const T& value) {
    const WordsOf<T> words(value);
#pragma unroll
    for (int i = 0; i < WordsOf<T>::kWords; ++i) slot[warp * kMaxWords + i] = words.word[i];
  }
  template <class T>
  __device__ static T get(const uint32_t* slot, int warp) {
    WordsOf<T> words{T{}};
#pragma unroll
    for (int i = 0; i < WordsOf<T>::kWords; ++i) words.word[i] = slot[warp * kMaxWords + i];
    return words.value();
  }

  uint32_t* slots_;
  uint32_t turn_ = 0;
};

// Integers that compare as the floats do. The two zeros are equal.
__device__ __forceinline__ uint32_t ordered(float value) {
  const uint32_t bits = bits_of(value + 0.0f);
  return bits ^ (bits >> 31 != 0 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float from_ordered(uint32_t key) {
  return float_of(key ^ (key >> 31 != 0 ? 0x80000000u : 0xffffffffu));
}

// A number that is greater for the greater value, and among equal values for the lower id. 0 is less than any.
__device__ __forceinline__ uint64_t key_of(uint32_t greater_is_better, int32_t id) {
  return uint64_t(greater_is_better) << 32 | (0xffffffffu - uint32_t(id));
}
__device__ __forceinline__ int32_t id_of(uint64_t key) { return int32_t(0xffffffffu - uint32_t(key)); }

}  // namespace specdec::cuda

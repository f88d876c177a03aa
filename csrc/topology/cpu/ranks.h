// Candidates by (score falling, index rising), as one number each: the bits of the score above the complement of the
// index. The best has the greatest, and no two are equal, so any selection or sort gives one result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/cpu/thread_pool.h"

namespace specdec::cpu {

constexpr int64_t kMinCandidatesPerThread = 4096;  // about 10 us of work, several times the cost of starting a thread

// Greater for the greater score, and among equals for the lower index.
inline uint64_t rank_key(float score, int32_t index) {
  const float one_zero = score + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &one_zero, sizeof bits);
  bits ^= bits >> 31 != 0 ? 0xffffffffu : 0x80000000u;
  return uint64_t{bits} << 32 | (0xffffffffu - uint32_t(index));
}
inline int32_t index_of(uint64_t key) { return int32_t(0xffffffffu - uint32_t(key)); }

inline int threads_for(int64_t candidates, int threads) {
  return static_cast<int>(std::clamp<int64_t>(candidates / kMinCandidatesPerThread, 1, std::max(threads, 1)));
}

// work(begin, end) of requests: here where one thread does it all, for a region of threads costs as much as a level.
template <class Work>
void share_requests(int64_t batch, int pool, Work work) {
  if (pool == 1) return work(0, batch);
  deal(pool, pool, [&](int64_t part) { work(batch * part / pool, batch * (part + 1) / pool); });
}

}  // namespace specdec::cpu

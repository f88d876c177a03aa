// Instruments for the benchmarks: the speed of a plain read, and a way to make data cold.
#include "cpu/instruments.h"

#include <cstring>

namespace specdec {

uint64_t read_bytes(const void* address, size_t bytes, int threads) {
  const char* data = static_cast<const char*>(address);
  const int64_t blocks = int64_t(bytes / 256);
  uint64_t total = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(^ : total) if (threads > 1)
  for (int64_t block = 0; block < blocks; block++) {
    uint64_t words[32];
    std::memcpy(words, data + block * 256, 256);
    uint64_t sum = 0;
    for (int i = 0; i < 32; i++) sum ^= words[i];
    total ^= sum;
  }
  return total;
}

bool evict_from_cache(const void* address, size_t bytes) {
#ifdef SPECDEC_X86
  const char* data = static_cast<const char*>(address);
  for (size_t i = 0; i < bytes; i += 64) __builtin_ia32_clflush(data + i);
  __builtin_ia32_mfence();
  return true;
#else
  (void)address, (void)bytes;
  return false;
#endif
}

}  // namespace specdec

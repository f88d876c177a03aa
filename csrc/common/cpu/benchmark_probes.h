// Instruments for the benchmarks: how fast this machine reads and multiplies at best, and a way to make data cold.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace specdec {

// How a buffer is read. Every thread has a part of its own, and goes through `streams` places of it side by side.
struct ReadWay {
  int threads = 1;
  int streams = 1;
  int ahead = 0;         // bytes by which lines are prefetched before they are read; 0: the processor does that alone
  bool nearest = false;  // whether they are prefetched into the first cache (T0), not into the second (T1)
};

constexpr int kMaxReadStreams = 16;

// Reads a buffer once, and returns the exclusive or of its words.
uint64_t read_bytes(const void* address, size_t bytes, const ReadWay& way);

// Runs `rounds` of independent multiply-adds in registers on each thread. Returns how many floating-point operations
// that was, 0 where the processor lacks the instruction set. "generic", "avx2" and "avx512" are float32; "avx512_bf16"
// and "amx" multiply bfloat16 and add float32.
double multiply_adds(const std::string& isa, int64_t rounds, int threads);

// Flushes a buffer from every cache. False where the processor offers no way to do it.
bool evict_from_cache(const void* address, size_t bytes);

}  // namespace specdec

namespace specdec::cpu {

// The same of one instruction set, for one thread (common/cpu/benchmark_loops.h).
#define SPECDEC_INSTRUMENTS(isa)                                             \
  namespace isa {                                                            \
  uint64_t read_streams(const char* data, size_t bytes, const ReadWay& way); \
  double multiply_adds(int64_t rounds);                                      \
  }
SPECDEC_INSTRUMENTS(generic)
SPECDEC_INSTRUMENTS(avx2)
SPECDEC_INSTRUMENTS(avx512)
SPECDEC_INSTRUMENTS(avx512_bf16)
SPECDEC_INSTRUMENTS(amx)
#undef SPECDEC_INSTRUMENTS

}  // namespace specdec::cpu

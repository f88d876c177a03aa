#include "common/cpu/benchmark_probes.h"

#include <algorithm>

#include "common/cpu/isa.h"

namespace specdec::cpu {
namespace {

auto reader() {
#ifdef SPECDEC_HAVE_AVX512
  if (has_isa(Isa::kAvx512)) return avx512::read_streams;
#endif
#ifdef SPECDEC_HAVE_AVX2
  if (has_isa(Isa::kAvx2)) return avx2::read_streams;
#endif
  return generic::read_streams;
}

double (*multiplier(const std::string& isa))(int64_t) {
#ifdef SPECDEC_HAVE_AMX
  if (isa == "amx" && has_isa(Isa::kAmx)) return amx::multiply_adds;
#endif
#ifdef SPECDEC_HAVE_AVX512_BF16
  if (isa == "avx512_bf16" && has_isa(Isa::kAvx512Bf16)) return avx512_bf16::multiply_adds;
#endif
#ifdef SPECDEC_HAVE_AVX512
  if (isa == "avx512" && has_isa(Isa::kAvx512)) return avx512::multiply_adds;
#endif
#ifdef SPECDEC_HAVE_AVX2
  if (isa == "avx2" && has_isa(Isa::kAvx2)) return avx2::multiply_adds;
#endif
  return isa == "generic" ? generic::multiply_adds : nullptr;
}

}  // namespace

}  // namespace specdec::cpu

namespace specdec {

using namespace cpu;

uint64_t read_bytes(const void* address, size_t bytes, const ReadWay& way) {
  const auto read = reader();
  const char* data = static_cast<const char*>(address);
  const size_t share = (bytes / way.threads + 4095) / 4096 * 4096;  // whole pages, but for the last thread
  uint64_t total = 0;
#pragma omp parallel for schedule(static) num_threads(way.threads) reduction(^ : total) if (way.threads > 1)
  for (int thread = 0; thread < way.threads; thread++) {
    const size_t begin = std::min(bytes, thread * share);
    total ^= read(data + begin, std::min(share, bytes - begin), way);
  }
  return total;
}

double multiply_adds(const std::string& isa, int64_t rounds, int threads) {
  const auto multiply = multiplier(isa);
  if (multiply == nullptr) return 0;
  double operations = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : operations) if (threads > 1)
  for (int thread = 0; thread < threads; thread++) operations += multiply(rounds);
  return operations;
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

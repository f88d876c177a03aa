// Asks the processor (and, for the matrix unit, the kernel of the operating system) what may be used.
#include "common/cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(SPECDEC_HAVE_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace specdec::cpu {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512_bf16", "amx"};

#ifdef SPECDEC_HAVE_AMX
// Linux hands out the matrix registers' state on request, once per process.
bool may_use_matrix_unit() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa best_isa() {
  Isa best = Isa::kGeneric;
#ifdef SPECDEC_X86
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return best;
  best = Isa::kAvx2;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")))
    return best;
  best = Isa::kAvx512;
#ifdef SPECDEC_HAVE_AVX512_BF16
  if (!(__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"))) return best;
  // Intel's cores issue the bfloat16 dot product at a third of the rate of fp32 multiply-adds (measured on a 2024 Xeon:
  // 75 against 227 GFLOP/s); AMD's at twice the rate. With the matrix unit at hand it doesn't matter.
  if (!__builtin_cpu_is("intel")) best = Isa::kAvx512Bf16;
#ifdef SPECDEC_HAVE_AMX
  if (may_use_matrix_unit()) best = Isa::kAmx;
#endif
#endif
#endif
  return best;
}

Isa parse(const std::string& name, const char* source) {
  for (int i = 0; i < 5; i++)
    if (name == kNames[i]) return static_cast<Isa>(i);
  throw std::invalid_argument(std::string(source) + " must be generic, avx2, avx512, avx512_bf16 or amx, got '" + name +
                              "'");
}

Isa limited(Isa limit) {
  static const Isa best = best_isa();
  // A processor that has the dot product but is not given it by default may be asked for it by name.
  if (limit == Isa::kAvx512Bf16 && best == Isa::kAvx512) {
#ifdef SPECDEC_HAVE_AVX512_BF16
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16")) return limit;
#endif
  }
  return limit < best ? limit : best;
}

Isa from_environment() {
  const char* name = std::getenv("SPECDEC_OPS_CPU_ISA");
  return limited(name && *name ? parse(name, "SPECDEC_OPS_CPU_ISA") : Isa::kAmx);
}

[[maybe_unused]] bool vnni_is_allowed = true;

Isa& selected() {
  static Isa isa = from_environment();
  return isa;
}

}  // namespace

Isa current_isa() { return selected(); }

bool has_isa(Isa isa) { return limited(isa) == isa; }

bool may_use_vnni() {
#ifdef SPECDEC_HAVE_AVX512_VNNI
  static const bool has = __builtin_cpu_supports("avx512vnni");
  return has && vnni_is_allowed && current_isa() >= Isa::kAvx512;
#else
  return false;
#endif
}

void allow_vnni(bool allowed) { vnni_is_allowed = allowed; }

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

void limit_isa(const std::string& name) {
  selected() = name.empty() ? from_environment() : limited(parse(name, "the instruction set"));
}

}  // namespace specdec::cpu

// Which instruction set the CPU kernels run with.
#pragma once

#include <cstdint>
#include <string>

namespace specdec {
struct MergeStatesParams;
}

namespace specdec::cpu {

enum class Isa { kGeneric, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// The best that was compiled in, that this processor has, and that SPECDEC_OPS_CPU_ISA or limit_isa() allows.
Isa current_isa();
const char* isa_name(Isa isa);

// Whether it was compiled in and this processor has it, whatever limit is set.
bool has_isa(Isa isa);

// Whether the int8 dot products of AVX-512 may be used: some processors of kAvx512 have them, all later ones do.
bool may_use_vnni();

// Withholds them, as from a processor without: for tests.
void allow_vnni(bool allowed);

// "" removes the limit. Throws std::invalid_argument on an unknown name. For tests and benchmarks: not thread-safe.
void limit_isa(const std::string& name);

}  // namespace specdec::cpu

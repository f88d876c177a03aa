// Which instruction set the CPU kernels run with.
#pragma once

#include <string>

namespace specdec {

enum class Isa { kGeneric, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// The best that was compiled in, that this processor has, and that SPECDEC_OPS_CPU_ISA or limit_isa() allows.
Isa current_isa();
const char* isa_name(Isa isa);

// "" removes the limit. Throws std::invalid_argument on an unknown name. For tests and benchmarks: not thread-safe.
void limit_isa(const std::string& name);

}  // namespace specdec

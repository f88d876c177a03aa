#define SPECDEC_ISA avx512_bf16
#include "common/cpu/benchmark_loops.h"

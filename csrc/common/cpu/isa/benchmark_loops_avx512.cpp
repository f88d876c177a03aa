#define SPECDEC_ISA avx512
#include "common/cpu/benchmark_loops.h"

#define SPECDEC_ISA avx2
#include "common/cpu/benchmark_loops.h"

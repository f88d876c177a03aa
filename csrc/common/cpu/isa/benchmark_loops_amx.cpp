#define SPECDEC_ISA amx
#include "common/cpu/benchmark_loops.h"

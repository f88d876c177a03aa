#define SPECDEC_ISA generic
#include "common/cpu/benchmark_loops.h"

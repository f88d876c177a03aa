#define SPECDEC_ISA avx512
#include "cpu/instrument_loops.h"

#define SPECDEC_ISA avx512_bf16
#include "cpu/instrument_loops.h"

#define SPECDEC_ISA avx2
#include "cpu/instrument_loops.h"

#define SPECDEC_ISA avx512
#include "cpu/exit_tile.h"

#define SPECDEC_ISA avx2
#include "cpu/exit_tile.h"

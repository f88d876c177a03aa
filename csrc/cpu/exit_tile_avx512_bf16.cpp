#define SPECDEC_ISA avx512_bf16
#include "cpu/exit_tile.h"

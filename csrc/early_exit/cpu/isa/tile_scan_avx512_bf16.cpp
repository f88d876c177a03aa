#define SPECDEC_ISA avx512_bf16
#include "early_exit/cpu/tile_scan.h"

#define SPECDEC_ISA avx512
#include "early_exit/cpu/tile_scan.h"

#define SPECDEC_ISA avx2
#include "early_exit/cpu/tile_scan.h"

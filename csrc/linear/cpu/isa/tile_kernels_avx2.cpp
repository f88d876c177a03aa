#define SPECDEC_ISA avx2
#include "linear/cpu/tile_kernels.h"

#define SPECDEC_ISA avx512
#include "linear/cpu/tile_kernels.h"

#define SPECDEC_ISA generic
#include "linear/cpu/tile_kernels.h"

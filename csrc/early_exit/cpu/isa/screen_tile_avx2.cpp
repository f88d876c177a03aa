#define SPECDEC_ISA avx2
#include "early_exit/cpu/screen_tile.h"

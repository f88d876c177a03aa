#define SPECDEC_ISA avx512
#include "early_exit/cpu/screen_tile.h"

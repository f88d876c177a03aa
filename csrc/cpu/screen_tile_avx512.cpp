#define SPECDEC_ISA avx512
#include "cpu/screen_tile.h"

#define SPECDEC_ISA avx2
#include "cpu/screen_tile.h"

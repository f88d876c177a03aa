#define SPECDEC_ISA generic
#include "early_exit/cpu/screen_tile.h"

#define SPECDEC_ISA generic
#include "cpu/screen_tile.h"

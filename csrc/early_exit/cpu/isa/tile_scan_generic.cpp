#define SPECDEC_ISA generic
#include "early_exit/cpu/tile_scan.h"

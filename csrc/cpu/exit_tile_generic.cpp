#define SPECDEC_ISA generic
#include "cpu/exit_tile.h"

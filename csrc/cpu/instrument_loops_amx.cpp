#define SPECDEC_ISA amx
#include "cpu/instrument_loops.h"

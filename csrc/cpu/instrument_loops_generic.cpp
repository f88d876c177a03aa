#define SPECDEC_ISA generic
#include "cpu/instrument_loops.h"

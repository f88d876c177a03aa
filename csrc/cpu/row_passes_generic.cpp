#define SPECDEC_ISA generic
#include "cpu/row_passes.h"

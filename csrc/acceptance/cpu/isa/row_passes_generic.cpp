#define SPECDEC_ISA generic
#include "acceptance/cpu/row_passes.h"

#define SPECDEC_ISA avx2
#include "acceptance/cpu/row_passes.h"

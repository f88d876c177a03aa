#define SPECDEC_ISA avx512
#include "acceptance/cpu/row_passes.h"

#define SPECDEC_ISA avx2
#include "cpu/row_passes.h"

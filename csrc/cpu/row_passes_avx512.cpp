#define SPECDEC_ISA avx512
#include "cpu/row_passes.h"

#define SPECDEC_ISA avx512
#include "linear/cpu/rms_norm_rows.h"

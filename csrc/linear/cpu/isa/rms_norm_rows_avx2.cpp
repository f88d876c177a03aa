#define SPECDEC_ISA avx2
#include "linear/cpu/rms_norm_rows.h"

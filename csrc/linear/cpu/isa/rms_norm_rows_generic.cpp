#define SPECDEC_ISA generic
#include "linear/cpu/rms_norm_rows.h"

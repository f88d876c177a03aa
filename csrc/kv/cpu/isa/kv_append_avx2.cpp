#define SPECDEC_ISA avx2
#include "kv/cpu/kv_append.h"

#define SPECDEC_ISA avx512
#include "kv/cpu/kv_append.h"

#define SPECDEC_ISA generic
#include "kv/cpu/kv_append.h"

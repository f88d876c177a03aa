#define SPECDEC_ISA avx512_bf16
#include "linear/cpu/product_kernels.h"

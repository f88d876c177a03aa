#define SPECDEC_ISA avx512
#include "linear/cpu/product_kernels.h"

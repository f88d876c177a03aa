#define SPECDEC_ISA avx2
#include "linear/cpu/product_kernels.h"

#define SPECDEC_ISA generic
#include "linear/cpu/product_kernels.h"

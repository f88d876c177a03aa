// The CPU kernels of linear and rms_norm, as the bindings call it.
#pragma once

#include "linear/params.h"

namespace specdec {

void linear_cpu(const LinearParams& params, int threads);
void rms_norm_cpu(const RmsNormParams& params, int threads);

}  // namespace specdec

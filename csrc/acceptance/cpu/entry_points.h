// The acceptance and sampling kernels, as the bindings call them.
#pragma once

#include "acceptance/params.h"

namespace specdec {

void accept_cpu(const AcceptParams& params, int threads);
void sample_cpu(const SampleParams& params, int threads);

}  // namespace specdec

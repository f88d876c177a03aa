// The decision models' kernel, as the bindings call it.
#pragma once

#include "early_exit/params.h"

namespace specdec {

void exit_mlp_cpu(const MlpParams& params, int threads);

}  // namespace specdec

// The CPU kernel of linear, as the bindings call it.
#pragma once

#include "linear/params.h"

namespace specdec {

void linear_cpu(const LinearParams& params, int threads);

}  // namespace specdec

#include "common/cpu/build_info.h"

namespace specdec {

BuildInfo build_info() { return {SPECDEC_VERSION, SPECDEC_COMPILER, SPECDEC_CUDA, SPECDEC_ARCHS, SPECDEC_LEFT_OUT}; }

}  // namespace specdec

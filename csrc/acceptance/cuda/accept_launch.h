// Calls of the CUDA acceptance and sampling kernels: the parameters that all backends share, and where scratch lies.
#pragma once

#include "acceptance/params.h"

namespace specdec {

// Which launches are made. The results are those of the same rules; only the order of some sums differs.
enum class AcceptPath : int32_t { kAuto = 0, kLazy = 1, kEager = 2 };

struct AcceptLaunch {
  AcceptParams call;
  uint8_t* scratch;   // may hold anything
  int32_t* counters;  // zero before the first call; every call leaves zeros
  AcceptPath launch_path;

  // Filled in by the launcher.
  int32_t spans;   // blocks that share a row; 0: the lazy path
  int64_t stride;  // bytes of a request's scratch
  int64_t states, terms, marks, distributions, parts, draw, bits, draw_parts;  // where each begins in it
};

struct SampleLaunch {
  SampleParams call;
  uint8_t* scratch;  // as above
  int32_t* counters;

  // Filled in by the launcher.
  int32_t spans;                  // blocks that share a row
  int64_t keys, drawn, statuses;  // where each begins in the scratch
};

}  // namespace specdec

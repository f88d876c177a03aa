// What the build has compiled. In a file of its own, so that another choice compiles little else anew.
#pragma once

namespace specdec {

struct BuildInfo {
  const char* version;
  const char* compiler;
  const char* cuda;      // the toolkit's version, or "" when built without it
  const char* archs;     // "8.0 9.0 ...", or ""
  const char* left_out;  // which CUDA kernels are missing, why, and how to add them, or ""
};

BuildInfo build_info();

}  // namespace specdec

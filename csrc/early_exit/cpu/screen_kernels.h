// What the screened head asks of each instruction set: scans of a row's approximate logits.
#pragma once

#include <cstdint>

#include "early_exit/screen_bounds.h"

namespace specdec::cpu {

constexpr int kScreenStep = 64;  // entries at a time

struct ScreenScan {
  ScreenBound bound;
  float reference;  // not below s + e of any entry in the tail
  float cut;        // entries that may reach this are rechecked
  float deep;       // and those whose approximation is above this
  float temperature;
};

struct ScreenKernels {
  // Takes lower bounds of logits in among the `top_k` greatest, descending. False if a logit is NaN or +inf. `count`
  // is a multiple of kScreenStep, as below; padding is a logit of -inf.
  bool (*note)(const float* approximate, const float* error_norms, const float* norms, int count,
               const ScreenBound& bound, int top_k, float* lower);
  // The greatest error_norms[v] + norms[v].
  float (*longest)(const float* error_norms, const float* norms, int count);
  // Adds up the tail, and writes which entries are not in it. Returns how many.
  int (*scan)(const float* approximate, const float* error_norms, const float* norms, int count, const ScreenScan& scan,
              int32_t first_entry, int32_t* entries, ScreenTail& tail);
  // Adds exp((z - first) / T) of each logit, and the same times (first - z) / T. `count` is whole vectors, as above.
  void (*weigh)(const float* logits, int count, float first, float temperature, double& sum, double& fall);
};

namespace generic {
extern const ScreenKernels kScreenKernels;
}
namespace avx2 {
extern const ScreenKernels kScreenKernels;
}
namespace avx512 {
extern const ScreenKernels kScreenKernels;
}

}  // namespace specdec::cpu

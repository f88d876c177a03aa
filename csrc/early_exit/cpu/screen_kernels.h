// What the screened head asks of each instruction set: looks at a row's approximate logits.
#pragma once

#include <cstdint>

#include "early_exit/params.h"

namespace specdec::cpu {

// How far logit v of one hidden row may lie from its approximation a:
// by_error * error_norms[v] + by_norm * norms[v] + floor + kScreenRounding * |a|. See early_exit/cpu/screened_exit.cpp.
struct ScreenBound {
  float by_error, by_norm, floor;
};
constexpr float kScreenRounding = 0x1p-21f;
constexpr int kScreenStep = 64;  // entries at a time

// What the entries that are not rechecked may add to the sum of exp((z - reference) / T). With approximations
// s = (a - reference) / T, their weights w = exp(s), and bounds e of what s may be wrong by:
struct ScreenTail {
  double upper, lower;  // sums of exp(s + e) and of exp(s - e)
  double weight;        // sum of w
  double squares;       // of w^2
  double peak;          // greatest w
  double error;         // greatest e
  double noise;         // greatest part of an e that is not by_error's
  double upper_fall;    // not below the sum of exp(true s) * -(true s)
  double lower_fall;    // not above it
  double fall;          // sum of w * -s
  double turn_squares;  // sum of (w * (1 + s))^2
  double peak_fall;     // greatest w * -s
};

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

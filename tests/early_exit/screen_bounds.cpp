// The polynomials that stand for exp(e) and exp(-e) in the screen's tail, at every step of a thousandth: never on the
// wrong side, but for roundings that kFloatRoom in early_exit/screen_bounds.h covers ten times, and not far off where
// errors are small. Prints the first place where that does not hold.
#define SPECDEC_ISA generic
#include <cmath>
#include <cstdio>

#include "early_exit/cpu/screen_tile.h"

int main() {
  using namespace specdec::cpu::generic;
  constexpr double kRoom = 1e-5;
  for (int step = 0; step <= int(kSmallError * 1000); step++) {
    const float error = float(step) / 1000;
    Vec above, below;
    bound_exponentials(splat(error), above, below);
    const double high = std::exp(double(error)), low = std::exp(-double(error));
    const bool sound = above[0] >= high * (1 - kRoom) && below[0] <= low * (1 + kRoom) && below[0] >= 0;
    const bool near = error > 0.5 || (above[0] <= high * 1.005 && below[0] >= low * 0.995);
    if (sound && near) continue;
    std::printf("at %g: %.7g for %.7g, %.7g for %.7g\n", error, double(above[0]), high, double(below[0]), low);
    return 1;
  }
  return 0;
}

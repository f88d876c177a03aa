// csrc/early_exit/screen_bounds.h for Python: of each case 19 numbers in, 9 out.
#include <initializer_list>

#include "early_exit/screen_bounds.h"

extern "C" __attribute__((visibility("default"))) void bounded_stats_of(const double* numbers, double* stats,
                                                                        int cases) {
  for (int i = 0; i < cases; i++, numbers += 19, stats += 9) {
    const specdec::KnownLogits known = {float(numbers[0]), float(numbers[1]), numbers[2], numbers[3]};
    const double* t = numbers + 4;
    const specdec::ScreenTail tail = {t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9], t[10], t[11]};
    const specdec::BoundedStats of = specdec::bounded_stats(known, tail, float(numbers[16]), numbers[17], numbers[18]);
    double* to = stats;
    for (const specdec::BoundedStat& stat : {of.max_prob, of.margin, of.entropy}) {
      *to++ = stat.value;
      *to++ = stat.bounds.low;
      *to++ = stat.bounds.high;
    }
  }
}

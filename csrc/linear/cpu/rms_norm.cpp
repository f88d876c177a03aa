// rms_norm on CPUs: rows are shared out among threads; the arithmetic is in linear/cpu/rms_norm_rows.h.
#include <algorithm>

#include "common/cpu/isa.h"
#include "common/cpu/thread_pool.h"
#include "linear/cpu/entry_points.h"

namespace specdec {

namespace cpu::generic {
void rms_norm_rows(const RmsNormParams& p, int64_t begin, int64_t end);
}
namespace cpu::avx2 {
void rms_norm_rows(const RmsNormParams& p, int64_t begin, int64_t end);
}
namespace cpu::avx512 {
void rms_norm_rows(const RmsNormParams& p, int64_t begin, int64_t end);
}

void rms_norm_cpu(const RmsNormParams& p, int threads) {
  using namespace cpu;
  auto norm_rows = generic::rms_norm_rows;
#ifdef SPECDEC_X86
  if (current_isa() >= Isa::kAvx512) {
    norm_rows = avx512::rms_norm_rows;
  } else if (current_isa() >= Isa::kAvx2) {
    norm_rows = avx2::rms_norm_rows;
  }
#endif
  constexpr int64_t kElementsPerTask = 1 << 15;  // less is not worth waking a thread for
  const int64_t rows_per_task = std::max<int64_t>(kElementsPerTask / std::max(p.dim, 1), 1);
  const int64_t tasks = (p.rows + rows_per_task - 1) / rows_per_task;
  deal(threads, tasks, [&](int64_t task) {
    norm_rows(p, task * rows_per_task, std::min<int64_t>((task + 1) * rows_per_task, p.rows));
  });
}

}  // namespace specdec

// merge_states on CPUs: rows are shared out among threads; the arithmetic is in attention/cpu/merge.h.
#include <algorithm>

#include "attention/cpu/entry_points.h"
#include "attention/cpu/merge_kernels.h"
#include "common/cpu/isa.h"
#include "common/cpu/thread_pool.h"

namespace specdec {

using namespace cpu;

void merge_states_cpu(const MergeStatesParams& p, int threads) {
  auto merge_rows = generic::merge_rows;
#ifdef SPECDEC_X86
  if (current_isa() >= Isa::kAvx2) merge_rows = avx2::merge_rows;
  if (current_isa() >= Isa::kAvx512) merge_rows = avx512::merge_rows;
#endif
  constexpr int64_t kElementsPerTask = 1 << 15;  // less is not worth waking a thread for
  const int64_t rows_per_task = std::max<int64_t>(kElementsPerTask / std::max(p.dim, 1), 1);
  const int64_t tasks = (p.rows + rows_per_task - 1) / rows_per_task;
  cpu::deal(threads, tasks,
            [&](int64_t task) { merge_rows(p, task * rows_per_task, std::min((task + 1) * rows_per_task, p.rows)); });
}

void exp2_cpu(const float* x, float* y, int64_t count, bool weights) {
  auto exp2_values = generic::exp2_values;
#ifdef SPECDEC_X86
  if (current_isa() >= Isa::kAvx2) exp2_values = avx2::exp2_values;
  if (current_isa() >= Isa::kAvx512) exp2_values = avx512::exp2_values;
#endif
  exp2_values(x, y, count, weights);
}

}  // namespace specdec

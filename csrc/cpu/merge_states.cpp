// merge_states on CPUs: rows are shared out among threads; the arithmetic is in cpu/merge.h.
#include <algorithm>

#include "cpu/isa.h"
#include "cpu/kernels.h"

namespace specdec {

namespace generic {
void merge_rows(const MergeStatesParams& p, int64_t begin, int64_t end);
}
namespace avx2 {
void merge_rows(const MergeStatesParams& p, int64_t begin, int64_t end);
}
namespace avx512 {
void merge_rows(const MergeStatesParams& p, int64_t begin, int64_t end);
}

void merge_states_cpu(const MergeStatesParams& p, int threads) {
  auto merge_rows = generic::merge_rows;
#ifdef SPECDEC_X86
  if (current_isa() >= Isa::kAvx2) merge_rows = avx2::merge_rows;
  if (current_isa() >= Isa::kAvx512) merge_rows = avx512::merge_rows;
#endif
  constexpr int64_t kElementsPerTask = 1 << 15;  // less is not worth waking a thread for
  const int64_t rows_per_task = std::max<int64_t>(kElementsPerTask / std::max(p.dim, 1), 1);
  const int64_t tasks = (p.rows + rows_per_task - 1) / rows_per_task;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && tasks > 1)
  for (int64_t task = 0; task < tasks; task++)
    merge_rows(p, task * rows_per_task, std::min((task + 1) * rows_per_task, p.rows));
}

}  // namespace specdec

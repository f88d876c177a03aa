// kv_append on CPUs: rows are shared out among threads; the arithmetic is in kv/cpu/kv_append.h.
#include <algorithm>
#include <vector>

#include "common/cpu/isa.h"
#include "common/cpu/thread_pool.h"
#include "kv/cpu/append_kernels.h"
#include "kv/cpu/entry_points.h"

namespace specdec {

using namespace cpu;

void kv_append_cpu(const KvAppendParams& p, int threads) {
  auto append_rows = generic::append_rows;
#ifdef SPECDEC_X86
  if (current_isa() >= Isa::kAvx2) append_rows = avx2::append_rows;
  if (current_isa() >= Isa::kAvx512) append_rows = avx512::append_rows;
#endif
  // Two norms, two tables of a row, and a head that waits for its conversion.
  const size_t floats = 4 * size_t(p.k_dim) + size_t(std::max(p.k_dim, p.v_dim));
  constexpr int64_t kElementsPerTask = 1 << 16;  // less is not worth waking a thread for
  const int64_t row_elements = int64_t(p.heads + p.kv_heads) * p.k_dim + int64_t(p.kv_heads) * p.v_dim;
  const int64_t rows_per_task = std::max<int64_t>(kElementsPerTask / row_elements, 1);
  const int64_t tasks = (p.rows + rows_per_task - 1) / rows_per_task;
  Shares shares(tasks);
  run_team(int(std::min<int64_t>(threads, tasks)), [&](int) {
    std::vector<float> memory(floats);
    shares.take([&](int64_t task) {
      append_rows(p, task * rows_per_task, std::min((task + 1) * rows_per_task, p.rows), memory.data());
    });
  });
}

}  // namespace specdec

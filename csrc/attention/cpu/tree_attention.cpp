// Tree attention on CPUs: checks what only a kernel can see (attention/cpu/requests.h), cuts the call into tasks and
// splits (attention/cpu/task.h), and runs them on threads. The arithmetic is in attention/cpu/attention_kernel.h
// and the engines it is compiled with. Path-invariant calls have a scheduler of their own: attention/cpu/path_attention.cpp.
//
// Tasks of many rows are worth a thread each, which folds their splits as it goes. Tasks of few rows wait for memory:
// the kv heads of a request go through a split together, so that the cache is read in the order in which it lies, and
// splits run side by side, as do the splits of tasks that are fewer than the threads can share. The partial states of
// splits wait until all are there.
//
// Scratch: each thread holds one task's packed queries, one tile of scores and up to two partial states, together at
// most about 3 MB whatever the context length. Waiting states take at most 16 MB, or what one request needs if that is
// more (kMaxSplits states for each of its tasks). Buffers are freed at the end of the call.
#include <algorithm>
#include <vector>

#include "attention/cpu/buffer.h"
#include "attention/cpu/entry_points.h"
#include "attention/cpu/path_task.h"
#include "attention/cpu/requests.h"
#include "attention/cpu/task.h"
#include "common/cpu/isa.h"
#include "common/cpu/thread_pool.h"

namespace specdec::cpu {
namespace {

constexpr int kSplitSlots = 2048;
constexpr int kMaxSplits = 64;
constexpr int kSplitAlignment = 384;  // a multiple of every engine's tile (64, 96, 128)

constexpr int kFewRows = 32;
constexpr int kSplitSlotsOfFewRows = 256;
constexpr int kMaxSplitsOfFewRows = 32;
constexpr int kSplitAlignmentOfFewRows = 64;
constexpr int kMaxInARow = 8;

constexpr size_t kMaxStates = size_t(1) << 22;  // floats of waiting partial states, unless one request needs more
constexpr int kRowFloats = 1 << 17;             // a task's output state, so that it stays in the second-level cache

const TaskKernel* select_kernel(DType dtype, int rows, int dim) {
  const TaskKernel* kernel = nullptr;
  switch (current_isa()) {
    case Isa::kAmx:
#ifdef SPECDEC_HAVE_AMX
      if ((kernel = amx::select_kernel(dtype, rows, dim))) return kernel;
#endif
      [[fallthrough]];
    case Isa::kAvx512Bf16:
#ifdef SPECDEC_HAVE_AVX512_BF16
      if ((kernel = avx512_bf16::select_kernel(dtype, rows, dim))) return kernel;
#endif
      [[fallthrough]];
    case Isa::kAvx512:
#ifdef SPECDEC_X86
      if ((kernel = avx512::select_kernel(dtype, rows, dim))) return kernel;
#endif
      [[fallthrough]];
    case Isa::kAvx2:
#ifdef SPECDEC_X86
      if ((kernel = avx2::select_kernel(dtype, rows, dim))) return kernel;
#endif
      [[fallthrough]];
    case Isa::kGeneric:
      break;
  }
  return generic::select_kernel(dtype, rows, dim);
}

struct Plan {
  Task task;
  const TaskKernel* kernel;
  int split_slots, splits;
};

// Split sizes depend on the request's length alone (and on num_splits, when the caller fixes it).
void plan_splits(Plan& plan, int num_splits) {
  const int slots = std::max(plan.task.slots, 1);
  const bool few = plan.task.rows <= kFewRows;
  const int least = few ? kSplitSlotsOfFewRows : kSplitSlots, most = few ? kMaxSplitsOfFewRows : kMaxSplits;
  const int wanted =
      num_splits > 0 ? (slots + num_splits - 1) / num_splits : std::max(least, (slots + most - 1) / most);
  const int alignment = num_splits > 0 ? kGroupSlots : few ? kSplitAlignmentOfFewRows : kSplitAlignment;
  plan.split_slots = (wanted + alignment - 1) / alignment * alignment;
  plan.splits = (slots + plan.split_slots - 1) / plan.split_slots;
}

// AMD's cores need software prefetching to walk the strided rows of one head (1.2 to 1.7 times faster on a cold cache).
// Intel's fetch them on their own, and lose a tenth to the extra instructions.
bool wants_fetch_ahead() {
#ifdef SPECDEC_X86
  return !__builtin_cpu_is("intel");
#else
  return true;
#endif
}

std::vector<Plan> make_plans(const TreeAttentionParams& p) {
  static const bool fetch_ahead = wants_fetch_ahead();
  std::vector<Plan> plans;
  const int group = p.heads / p.kv_heads;
  for (int b = 0; b < p.batch; b++) {
    const Request r = read_request(p, b);
    for (int row = 0; row < r.queries; row++)
      if (row < r.first_row || row >= r.end_row) blank_row(p, b, r.first_query + row);
    if (r.first_row == r.end_row) continue;
    const int rows = (r.end_row - r.first_row) * group;
    const int most = std::max(kRowFloats / p.dim / 64 * 64, 64);
    const int groups = (rows + most - 1) / most;
    const int per_group = ((rows + groups - 1) / groups + 63) & ~63;
    for (int h = 0; h < p.kv_heads; h++)
      for (int first = 0; first < rows; first += per_group) {
        Plan plan{};
        const int first_row = r.first_row * group + first, count = std::min(per_group, rows - first);
        const int last_query = (first_row + count - 1) / group;
        const int slots = p.ancestors ? r.context_len + r.first_node + last_query + 1 : r.slots;
        plan.task = {&p, b, h, r.first_query, r.first_node, first_row, count, r.context_len, slots, fetch_ahead};
        plan.kernel = select_kernel(p.dtype, count, p.dim);
        plan_splits(plan, p.num_splits);
        plans.push_back(plan);
      }
  }
  blank_rows_of_nobody(p);
  return plans;
}

// How many tasks may go through a split together: those of few rows whose heads are neighbours in the cache.
int together(const Task& task) {
  const TreeAttentionParams& p = *task.params;
  return task.rows <= kFewRows && p.k_stride_head < p.k_stride_slot ? std::min(p.kv_heads, kMaxTogether) : 1;
}

struct Sizes {
  size_t partial = 0, scratch = 0;
};

Sizes largest(const std::vector<Plan>& plans) {
  Sizes sizes;
  for (const Plan& plan : plans) {
    const Task& task = plan.task;
    sizes.partial = std::max(sizes.partial, plan.kernel->partial_size(task.rows, task.params->dim));
    sizes.scratch = std::max(sizes.scratch, plan.kernel->scratch_size(task.rows, task.params->dim, together(task)));
  }
  sizes.partial = (sizes.partial + 15) & ~size_t(15);  // whole lines
  sizes.scratch = (sizes.scratch + 15) & ~size_t(15);
  return sizes;
}

void attend_split(const Plan& plan, int split, float* scratch, float* partial) {
  const int begin = split * plan.split_slots;
  const Task* task = &plan.task;
  plan.kernel->attend(&task, 1, begin, std::min(begin + plan.split_slots, task->slots), scratch, &partial);
}

// Each thread takes whole tasks and folds splits as it goes.
void run_tasks(const Plan* plans, size_t count, const Sizes& sizes, int threads) {
  threads = std::min<int>(threads, int(count));
  Shares tasks(count);
  run_team(
      threads,
      [&](int) {
        Buffer buffer(sizes.scratch + 2 * sizes.partial);
        float *partial = buffer.get() + sizes.scratch, *later = partial + sizes.partial;
        tasks.take([&](int64_t i) {
          attend_split(plans[i], 0, buffer.get(), partial);
          for (int c = 1; c < plans[i].splits; c++) {
            Interruption::check();
            attend_split(plans[i], c, buffer.get(), later);
            plans[i].kernel->merge(plans[i].task, partial, later);
          }
          plans[i].kernel->finish(plans[i].task, partial, buffer.get());
        });
      },
      Parts::kUneven);
}

// Tasks [first, last) through one split.
struct Work {
  size_t first, last;
  int split;
};

// Cuts the plans into work: requests, their tasks, and split by split. Tasks of few rows are kept together as far as
// the threads allow; which ones makes no difference to the result.
std::vector<Work> cut(const Plan* plans, size_t count, int threads) {
  std::vector<Work> work;
  size_t splits_in_all = 0;
  for (size_t i = 0; i < count; i++) splits_in_all += plans[i].splits;
  const size_t share = std::max<size_t>(splits_in_all / (size_t(4) * threads), 1);
  for (size_t i = 0, next; i < count; i = next) {
    for (next = i; next < count && plans[next].task.request == plans[i].task.request;) next++;
    const size_t step = std::min<size_t>(share, together(plans[i].task));
    for (size_t j = i, last; j < next; j = last) {
      last = j + 1;
      while (last < next && last < j + step && plans[last].task.first_row == plans[j].task.first_row) last++;
      for (int c = 0; c < plans[j].splits; c++) work.push_back({j, last, c});
    }
  }
  return work;
}

// Splits of one task may run on different threads; their states are folded in the same order as above.
void run_splits(const Plan* plans, size_t count, const Sizes& sizes, int threads) {
  const std::vector<Work> work = cut(plans, count, threads);
  std::vector<size_t> first_state(count + 1, 0);
  for (size_t i = 0; i < count; i++) first_state[i + 1] = first_state[i] + plans[i].splits;
  Buffer states(first_state[count] * sizes.partial);
  const auto state = [&](size_t i, int c) { return states.get() + (first_state[i] + c) * sizes.partial; };
  threads = std::min<int>(threads, int(work.size()));
  // Few rows wait for memory: a split's last tile fetches the next one's first, so threads take some in a row.
  const int share = std::clamp(int(work.size()) / (4 * threads), 1, kMaxInARow);
  const int in_a_row = plans[0].task.rows <= kFewRows ? share : 1;
  Shares splits(work.size(), in_a_row), merges(count);
  run_team(threads, [&](int) {
    Buffer scratch(sizes.scratch);
    splits.take([&](int64_t w) {
      const auto [first, last, split] = work[w];
      const Plan& plan = plans[first];
      const Task* tasks[kMaxTogether];
      float* partials[kMaxTogether];
      for (size_t i = first; i < last; i++) tasks[i - first] = &plans[i].task, partials[i - first] = state(i, split);
      const int begin = split * plan.split_slots, end = std::min(begin + plan.split_slots, plan.task.slots);
      plan.kernel->attend(tasks, int(last - first), begin, end, scratch.get(), partials);
    });
    splits.wait();
    merges.take([&](int64_t i) {
      for (int c = 1; c < plans[i].splits; c++) plans[i].kernel->merge(plans[i].task, state(i, 0), state(i, c));
      plans[i].kernel->finish(plans[i].task, state(i, 0), scratch.get());
    });
  });
}

// Runs plans in slices of whole requests whose waiting states stay within bounds.
void run(const std::vector<Plan>& plans, const Sizes& sizes, int threads) {
  const bool few_tasks = threads > 1 && plans.size() < size_t(4) * threads;
  for (size_t begin = 0, end; begin < plans.size(); begin = end) {
    const bool by_split = few_tasks || plans[begin].task.rows <= kFewRows;
    size_t states = 0;
    for (end = begin; end < plans.size(); end++) {
      const bool same_request = end > begin && plans[end].task.request == plans[end - 1].task.request;
      if (!same_request && (few_tasks || plans[end].task.rows <= kFewRows) != by_split) break;
      states += plans[end].splits * sizes.partial;
      if (by_split && !same_request && end > begin && states > kMaxStates) break;
    }
    (by_split ? run_splits : run_tasks)(plans.data() + begin, end - begin, sizes, threads);
  }
}

}  // namespace

}  // namespace specdec::cpu

namespace specdec {

using namespace cpu;

void tree_attention_cpu(const TreeAttentionParams& p, int threads) {
  if (p.path_invariant) return path_attention(p, std::max(threads, 1));
  const std::vector<Plan> plans = make_plans(p);
  if (plans.empty()) return;
  double products = 0;
  for (const Plan& plan : plans) products += 2.0 * plan.task.rows * plan.task.slots * p.dim;
  run(plans, largest(plans), threads_for(products, kProductsPerThread, threads));
}

}  // namespace specdec

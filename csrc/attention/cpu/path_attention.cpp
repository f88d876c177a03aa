// Path-invariant tree attention on CPUs: reads every row's path, cuts the call into tasks and chunks
// (attention/cpu/path_task.h), and runs them on OpenMP threads. The arithmetic is in attention/cpu/path_attention.h.
//
// Enough tasks are worth a thread each, which merges their chunks as it goes. Else the chunks of a task are shared out,
// and their states wait: some chunks of all tasks at a time, so that the states of a call stay within kMaxStates floats
// or what one chunk of every task needs. Both merge in the order of the chunks.
//
// Memory: 4 bytes for every node of every path of the call's rows, and for each thread one group of tasks' queries,
// scores and states, at most about 3 MB. Freed at the end of the call.
#include <algorithm>
#include <vector>

#include "attention/cpu/buffer.h"
#include "attention/cpu/path_task.h"
#include "attention/cpu/requests.h"
#include "common/cpu/isa.h"
#include "common/cpu/thread_pool.h"

namespace specdec::cpu {
namespace {

constexpr int kMostRows = 256;     // of a task, so that its scores and outputs stay in the second-level cache
constexpr int kRowsTogether = 16;  // up to here tasks whose heads are neighbours in the cache go together
constexpr size_t kMaxStates = size_t(1) << 21;

const PathKernel* select_path_kernel(DType dtype) {
  [[maybe_unused]] const PathKernel* kernel = nullptr;
  [[maybe_unused]] const Isa isa = current_isa();
#ifdef SPECDEC_HAVE_AVX512_BF16
  if (isa >= Isa::kAvx512Bf16 && (kernel = avx512_bf16::select_path_kernel(dtype))) return kernel;
#endif
#ifdef SPECDEC_X86
  if (isa >= Isa::kAvx512 && (kernel = avx512::select_path_kernel(dtype))) return kernel;
  if (isa >= Isa::kAvx2 && (kernel = avx2::select_path_kernel(dtype))) return kernel;
#endif
  return generic::select_path_kernel(dtype);
}

// The paths of a request's rows, as lists of slots.
struct RequestPaths {
  std::vector<RowPath> rows;
  std::vector<int32_t> slots;
};

RequestPaths read_paths(const TreeAttentionParams& p, int b, const Request& r) {
  RequestPaths paths;
  paths.rows.resize(r.end_row);
  const int64_t tree = p.topology_batch == 1 ? 0 : int64_t(b) * p.nodes;
  for (int row = r.first_row; row < r.end_row; row++) {
    const size_t begin = paths.slots.size();
    const int node = r.first_node + row;
    for (int word = 0; p.ancestors && word <= node / 64; word++) {
      uint64_t set = p.ancestors[(tree + node) * p.words + word];
      if (word == node / 64) set &= ~uint64_t(0) >> (63 - node % 64);  // a node sees none that comes after it
      for (; set != 0; set &= set - 1) paths.slots.push_back(r.context_len + 64 * word + __builtin_ctzll(set));
    }
    const int length = int(paths.slots.size() - begin);
    int64_t first_seen = 0;
    if (p.window > 0) {
      // Where a topology's depths contradict its ancestors the later edge counts: pages have been checked by depth.
      const int64_t depth = std::max(p.depths ? p.depths[tree + node] : 0, length - 1);
      first_seen = r.context_len + depth - p.window + 1;
    }
    const int64_t end = int64_t(r.context_len) + length;
    paths.rows[row] = {nullptr, length, int(std::clamp<int64_t>(first_seen, 0, end))};
  }
  const int32_t* next = paths.slots.data();
  for (int row = r.first_row; row < r.end_row; row++) {
    paths.rows[row].slots = next;
    next += paths.rows[row].length;
  }
  return paths;
}

// Tasks [first, last) that go through chunks side by side, and the chunks that one of their rows sees. They differ in
// their kv head alone.
struct Group {
  size_t first, last;
  int first_chunk, end_chunk;
  size_t state;  // floats of a task's state

  size_t states() const { return (last - first) * state; }
  // Where a row that sees nothing is, one chunk is made for it, and finds it empty.
  int chunks() const { return std::max(end_chunk - first_chunk, 1); }
};

struct Plan {
  std::vector<RequestPaths> paths;  // of each request
  std::vector<PathTask> tasks;
  std::vector<Group> groups;
  size_t states = 0, scratch = 0;  // the most floats of a group's states and scratch
};

size_t whole_lines(size_t floats) { return (floats + 15) & ~size_t(15); }

void add_tasks(Plan& plan, const TreeAttentionParams& p, int b, const Request& r, bool fetch_ahead) {
  const int heads_per_kv = p.heads / p.kv_heads;
  const int rows = (r.end_row - r.first_row) * heads_per_kv;
  const int parts = (rows + kMostRows - 1) / kMostRows;
  const int share = (rows + parts - 1) / parts, per_task = std::min((share + 3) & ~3, kMostRows);
  for (int first = 0; first < rows; first += per_task)
    for (int h = 0; h < p.kv_heads; h++) {
      PathTask task{&p,
                    b,
                    h,
                    r.first_query,
                    r.first_row * heads_per_kv + first,
                    std::min(per_task, rows - first),
                    r.context_len,
                    0,
                    0,
                    plan.paths[b].rows.data(),
                    fetch_ahead};
      task.first_seen = r.context_len;
      for (int row = task.first_row / heads_per_kv; row <= (task.first_row + task.rows - 1) / heads_per_kv; row++) {
        task.first_seen = std::min(task.first_seen, task.paths[row].first_seen);
        task.end_seen = std::max(task.end_seen, r.context_len + task.paths[row].length);
      }
      plan.tasks.push_back(task);
    }
}

Plan make_plan(const TreeAttentionParams& p, const PathKernel& kernel, int& threads) {
#ifdef SPECDEC_X86
  static const bool fetch_ahead = !__builtin_cpu_is("intel");  // see wants_fetch_ahead() of tree_attention.cpp
#else
  const bool fetch_ahead = true;
#endif
  Plan plan;
  plan.paths.resize(p.batch);
  for (int b = 0; b < p.batch; b++) {
    const Request r = read_request(p, b);
    for (int row = 0; row < r.queries; row++)
      if (row < r.first_row || row >= r.end_row) blank_row(p, b, r.first_query + row);
    if (r.first_row == r.end_row) continue;
    plan.paths[b] = read_paths(p, b, r);
    add_tasks(plan, p, b, r, fetch_ahead);
  }
  blank_rows_of_nobody(p);

  int64_t chunks = 0;
  double products = 0;
  for (const PathTask& task : plan.tasks) {
    chunks += (task.end_seen + kPathChunk - 1) / kPathChunk;
    products += 2.0 * task.rows * task.end_seen * p.dim;
  }
  threads = threads_for(products, kProductsPerThread, threads);
  const int64_t share = std::max<int64_t>(chunks / (int64_t(4) * threads), 1);
  for (size_t i = 0, next; i < plan.tasks.size(); i = next) {
    const PathTask& task = plan.tasks[i];
    const bool neighbours = task.rows <= kRowsTogether && p.k_stride_head < p.k_stride_slot;
    const size_t most = neighbours ? size_t(std::min<int64_t>(share, kMaxPathTogether)) : 1;
    next = i + 1;
    while (next < plan.tasks.size() && next < i + most && plan.tasks[next].request == task.request &&
           plan.tasks[next].first_row == task.first_row)
      next++;
    const int end_chunk = (task.end_seen + kPathChunk - 1) / kPathChunk;
    const size_t state = whole_lines(kernel.state_size(task.rows, p.dim));
    plan.groups.push_back({i, next, std::min(task.first_seen / kPathChunk, end_chunk), end_chunk, state});
    plan.states = std::max(plan.states, plan.groups.back().states());
    plan.scratch = std::max(plan.scratch, whole_lines(kernel.scratch_size(task.rows, p.dim, int(next - i))));
  }
  return plan;
}

void attend(const Plan& plan, const PathKernel& kernel, const Group& group, int chunk, float* scratch, float* states) {
  const PathTask* tasks[kMaxPathTogether];
  float* at[kMaxPathTogether];
  for (size_t i = 0; i < group.last - group.first; i++)
    tasks[i] = &plan.tasks[group.first + i], at[i] = states + i * group.state;
  kernel.attend(tasks, int(group.last - group.first), group.first_chunk + chunk, scratch, at);
}

void merge(const Plan& plan, const PathKernel& kernel, const Group& group, float* states, const float* later) {
  for (size_t i = 0; i < group.last - group.first; i++)
    kernel.merge(plan.tasks[group.first + i], states + i * group.state, later + i * group.state);
}

void finish(const Plan& plan, const PathKernel& kernel, const Group& group, const float* states) {
  for (size_t i = 0; i < group.last - group.first; i++)
    kernel.finish(plan.tasks[group.first + i], states + i * group.state);
}

// Each thread takes whole groups and merges chunks as it goes.
void run_groups(const Plan& plan, const PathKernel& kernel, int threads) {
  threads = std::min<int>(threads, int(plan.groups.size()));
  Shares groups(plan.groups.size());
  run_team(
      threads,
      [&](int) {
        Buffer buffer(plan.scratch + 2 * plan.states);
        float *states = buffer.get() + plan.scratch, *later = states + plan.states;
        groups.take([&](int64_t g) {
          const Group& group = plan.groups[g];
          attend(plan, kernel, group, 0, buffer.get(), states);
          for (int c = 1; c < group.chunks(); c++) {
            attend(plan, kernel, group, c, buffer.get(), later);
            merge(plan, kernel, group, states, later);
          }
          finish(plan, kernel, group, states);
        });
      },
      Parts::kUneven);
}

// A chunk of a group, counted from its first one, and where its states wait.
struct Work {
  size_t group;
  int chunk;
  float* states;
};

// Chunks are taken until their waiting states are many enough. A group with more chunks than that goes on afterwards.
void run_chunks(const Plan& plan, const PathKernel& kernel, int threads) {
  const size_t room = std::max(kMaxStates, plan.states);
  Buffer waiting(room), left(plan.states), goes_on(plan.states);
  float *from_before = left.get(), *for_later = goes_on.get();  // states of the group that goes on
  std::vector<Work> work;
  size_t group = 0;
  for (int chunk = 0; group < plan.groups.size();) {
    work.clear();
    const size_t first = group;
    const bool resumed = chunk > 0;
    for (size_t used = 0; group < plan.groups.size() && used + plan.groups[group].states() <= room;) {
      work.push_back({group, chunk, waiting.get() + used});
      used += plan.groups[group].states();
      if (++chunk == plan.groups[group].chunks()) group++, chunk = 0;
    }
    const int most = std::min<int>(threads, int(work.size()));
    Shares chunks(work.size());
    run_team(most, [&](int) {
      Buffer scratch(plan.scratch);
      chunks.take([&](int64_t w) {
        attend(plan, kernel, plan.groups[work[w].group], work[w].chunk, scratch.get(), work[w].states);
      });
    });
    const size_t last = chunk > 0 ? group + 1 : group;
    deal(most, int64_t(last - first), [&](int64_t at) {
      const size_t g = first + at;
      float* states = resumed && g == first ? from_before : nullptr;
      for (const Work& of : work) {
        if (of.group != g) continue;
        if (states)
          merge(plan, kernel, plan.groups[g], states, of.states);
        else
          states = of.states;
      }
      if (g == group)
        std::copy(states, states + plan.groups[g].states(), for_later);
      else
        finish(plan, kernel, plan.groups[g], states);
    });
    std::swap(from_before, for_later);
  }
}

}  // namespace

void path_attention(const TreeAttentionParams& p, int threads) {
  const PathKernel& kernel = *select_path_kernel(p.dtype);
  const Plan plan = make_plan(p, kernel, threads);
  if (plan.groups.empty()) return;
  const bool many = threads == 1 || plan.groups.size() >= size_t(4) * threads;
  (many ? run_groups : run_chunks)(plan, kernel, threads);
}

}  // namespace specdec::cpu

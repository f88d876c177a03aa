// What exit_confidence and its screened form share: the reading of the whole head, and the decision.
#pragma once

#include <vector>

#include "common/cpu/thread_pool.h"
#include "early_exit/cpu/exit_kernels.h"
#include "early_exit/cpu/exit_mlp.h"
#include "linear/cpu/few_row_products.h"

namespace specdec::cpu {

constexpr int kExitChunk = 512;  // rows of the head that one thread takes at a time
// The hidden rows of a call, for the kernels that multiply them.
InputRows hidden_rows(const ExitParams& p);

ThreadPool exit_threads(const ExitParams& p, int threads);

// What a row knows before it has seen anything.
ExitState empty_exit_state();

// Some of a call's hidden rows on their way over the head.
class HeadReader {
 public:
  HeadReader(const ExitParams& p, const std::vector<int>& rows, const ThreadPool& pool);

  const std::vector<int>& rows() const { return rows_; }

  // Takes the head's rows from `begin` to `end` into the states of these hidden rows, states[row].
  void read(int64_t begin, int64_t end, std::vector<ExitState>& states);

 private:
  void read_chunk(int64_t begin, int64_t end, ExitState* states);  // states [rows]

  const ExitParams& p_;
  const std::vector<int> rows_;
  const ThreadPool pool_;
  const decltype(ExitKernels::absorb) absorb_;
  const int top_k_;
  PackedRows packed_;
};

// Writes the statistics of a row from what it has seen.
void write_stats(const ExitParams& p, int row, const ExitState& state);

// Writes the statistics of these rows from the whole head.
void read_head(const ExitParams& p, const std::vector<int>& rows, const ThreadPool& pool);

// From the statistics of all rows, which of them exit.
void decide_exits(const ExitParams& p);

}  // namespace specdec::cpu

namespace specdec {

void screened_exit_cpu(const ScreenedParams& params, int threads);
void bounded_exit_cpu(const BoundedParams& params, int threads);

}  // namespace specdec

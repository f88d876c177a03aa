// What exit_confidence and its screened form share: the choice of kernels, the reading of the whole head, the decision.
#pragma once

#include <vector>

#include "common/cpu/thread_pool.h"
#include "early_exit/cpu/exit_kernels.h"

namespace specdec::cpu {

constexpr int kExitChunk = 512;         // rows of the head that one thread takes at a time
constexpr int kMaxIntegerDim = 65'536;  // sums of int8 times uint8 fit into 32 bits

struct AlignedBytes {
  explicit AlignedBytes(size_t bytes) : memory(bytes + 63) {}
  char* data() { return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t(63)); }
  std::vector<char> memory;
};

// `may_round`: hidden rows may be rounded to 16 bits before an int8 head, where that is faster.
ExitKernels exit_kernels(HeadType type, int dim, bool may_round);

// Some of a call's hidden rows in the form in which they are multiplied, which depends on how many the call has.
class PackedRows {
 public:
  PackedRows(const ExitKernels& kernels, HeadType type, int dim, int rows, int call_rows)
      : kernels_(kernels),
        type_(type),
        dim_(dim),
        rows_(rows),
        call_rows_(call_rows),
        row_bytes_(kernels.packed_bytes(type, dim)),
        packed_(row_bytes_ * ((rows + kExitTogether - 1) / kExitTogether * kExitTogether)) {}

  void set(int row, const float* y) { kernels_.pack(type_, y, dim_, packed_.data(), row, rows_, call_rows_); }

  // Calls take(row, logits [kExitTile]) for each row with its products with a tile of the head.
  template <class Take>
  void multiply(const ExitTile& tile, const Take& take) {
    alignas(64) float logits[kExitRowBlock * kExitTile];
    for (int first = 0; first < rows_; first += kExitRowBlock) {
      const int some = rows_ - first < kExitRowBlock ? rows_ - first : kExitRowBlock;
      kernels_.multiply(type_, tile, packed_.data() + first * row_bytes_, some, call_rows_, logits);
      for (int n = 0; n < some; n++) take(first + n, logits + n * kExitTile);
    }
  }

 private:
  const ExitKernels kernels_;
  const HeadType type_;
  const int dim_, rows_, call_rows_;
  const size_t row_bytes_;
  AlignedBytes packed_;
};

// Elements of a hidden row in float32, with the zeros behind it.
inline int64_t hidden_stride(int dim) { return (int64_t(dim) + kHiddenStep - 1) / kHiddenStep * kHiddenStep; }

// The length of a hidden row as it is multiplied, y, and that of y less what these kernels make of it.
struct HiddenLength {
  double whole, rounding;
};
HiddenLength hidden_length(const ExitKernels& kernels, const std::vector<float>& y, int dim);

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
  const ExitKernels kernels_;
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
void exit_mlp_cpu(const MlpParams& params, int threads);

}  // namespace specdec

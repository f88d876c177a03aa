// How one attention call is cut into pieces of work, shared by the scheduler and by every instruction set's kernels.
//
// A *task* is one request, one kv head and one group of its packed rows: row r is query (first_row + r) / group of the
// request and head kv_head * group + (first_row + r) % group, so the rows that read the same K and V lie together. A
// *split* is a range of slots. attend() runs a task over a split and leaves a partial state (output, maximum, sum);
// merge() folds a later split into an earlier one, finish() writes the rows. Splits are a function of the request's own
// lengths and are always merged in order, so neither threads nor neighbours change a result.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention/params.h"

namespace specdec::cpu {

struct Task {
  const TreeAttentionParams* params;
  int request;
  int kv_head;
  int64_t first_query;  // row of q (within the request, or of the packed q) that holds query 0 of the request
  int first_node;       // node of query 0; may be negative only for queries before this task's rows
  int first_row;        // packed row, counted from query 0
  int rows;
  int context_len;
  int slots;         // context_len and the nodes that the last row could see
  bool fetch_ahead;  // prefetch the next tile in software
};

constexpr int kGroupSlots = 16;  // slots are handled in groups of this many; splits start at a multiple of it

constexpr int kMaxTogether = 16;

constexpr int kMaxFewRows = 8;  // up to here the dims are the vector dimension (attention/cpu/engine_few_rows.h)

// The kernels of one instruction set for one dtype and number of rows. Sizes count floats. attend() takes up to
// kMaxTogether tasks that differ in their kv head alone and walks through the slots with all of them side by side: in
// a token-major cache the heads of a slot are neighbours, and memory is fastest when it is read in order.
struct TaskKernel {
  size_t (*partial_size)(int rows, int dim);
  size_t (*scratch_size)(int rows, int dim, int tasks);
  void (*attend)(const Task* const* tasks, int count, int begin, int end, float* scratch, float* const* partials);
  void (*merge)(const Task&, float* partial, const float* later);
  void (*finish)(const Task&, float* partial, float* scratch);
  int tile;  // slots that are multiplied at a time, and fetched ahead
};

// Null when the instruction set was not compiled in.
using SelectKernel = const TaskKernel* (*)(DType dtype, int rows, int dim);

namespace generic {
const TaskKernel* select_kernel(DType dtype, int rows, int dim);
}
namespace avx2 {
const TaskKernel* select_kernel(DType dtype, int rows, int dim);
}
namespace avx512 {
const TaskKernel* select_kernel(DType dtype, int rows, int dim);
}
namespace avx512_bf16 {
const TaskKernel* select_kernel(DType dtype, int rows, int dim);
}
namespace amx {
const TaskKernel* select_kernel(DType dtype, int rows, int dim);
}

}  // namespace specdec::cpu

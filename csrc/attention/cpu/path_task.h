// How a path-invariant attention call is cut into pieces of work, shared by its scheduler and by every instruction
// set's kernel (attention/cpu/path_attention.h).
//
// What a row sees are the positions [first_seen, context_len + length): position p of the context lies in slot p, those
// behind it in the slots of the row's path. Positions are cut into *chunks* of kPathChunk, always at the same places,
// and each chunk of a row leaves a state of its own: outputs, maximum and sum. States are merged in the order of the
// chunks, so who makes which of them, and when, changes no bit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention/params.h"

namespace specdec::cpu {

constexpr int kPathChunk = 256;       // positions; part of the result, like the instruction set
constexpr int kMaxPathTogether = 16;  // tasks that go through a chunk side by side

// What a query row sees, for all its heads.
struct RowPath {
  const int32_t* slots;  // of the positions context_len, context_len + 1, ...
  int length;            // of the path: 0 without a tree, else its node's depth + 1
  int first_seen;        // position; the window's edge
};

// One request, one kv head and a group of its packed rows: row r is query (first_row + r) / group of the request and
// head kv_head * group + (first_row + r) % group.
struct PathTask {
  const TreeAttentionParams* params;
  int request;
  int kv_head;
  int64_t first_query;  // row of q (within the request, or of the packed q) that holds query 0 of the request
  int first_row;        // packed row, counted from query 0
  int rows;
  int context_len;
  int first_seen;  // the lowest and the highest position that one of its rows sees, and the one behind it
  int end_seen;
  const RowPath* paths;  // of query 0 and those after it
  bool fetch_ahead;      // prefetch in software
};

// The kernel of one instruction set for one dtype. Sizes count floats. attend() takes up to kMaxPathTogether tasks that
// differ in their kv head alone.
struct PathKernel {
  size_t (*state_size)(int rows, int dim);
  size_t (*scratch_size)(int rows, int dim, int tasks);
  void (*attend)(const PathTask* const* tasks, int count, int chunk, float* scratch, float* const* states);
  void (*merge)(const PathTask&, float* state, const float* later);
  void (*finish)(const PathTask&, const float* state);
};

// Runs a path-invariant call; `threads` is at least 1.
void path_attention(const TreeAttentionParams& params, int threads);

// Null where an instruction set has no kernel of its own for the dtype.
namespace generic {
const PathKernel* select_path_kernel(DType dtype);
}
namespace avx2 {
const PathKernel* select_path_kernel(DType dtype);
}
namespace avx512 {
const PathKernel* select_path_kernel(DType dtype);
}
namespace avx512_bf16 {
const PathKernel* select_path_kernel(DType dtype);
}

}  // namespace specdec::cpu

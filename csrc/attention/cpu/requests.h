// The requests of a tree_attention call, as its schedulers read them.
#pragma once

#include <cstdint>

#include "attention/params.h"

namespace specdec::cpu {

constexpr double kProductsPerThread = 1 << 17;  // below this many another thread does not pay

struct Request {
  int64_t first_query;     // row of q where the request starts
  int queries;             // rows of q that it has
  int first_row, end_row;  // those whose node exists
  int first_node, context_len, slots;
};

// Reads request b, and throws std::invalid_argument, naming argument and request, where its numbers make no sense: a
// length beyond the cache, offsets that do not rise, a page that a row sees and that does not exist.
Request read_request(const TreeAttentionParams& p, int b);

// Writes 0 and -inf: a row without a node.
void blank_row(const TreeAttentionParams& p, int b, int64_t row);

// The same for packed rows before the first request and behind the last one.
void blank_rows_of_nobody(const TreeAttentionParams& p);

}  // namespace specdec::cpu

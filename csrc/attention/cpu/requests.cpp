// What only a kernel can check of a call: lengths, offsets and pages, which are values in tensors. Compiled for the
// oldest processor.
#include "attention/cpu/requests.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace specdec::cpu {
namespace {

[[noreturn]] void refuse(const std::string& message) {
  throw std::invalid_argument("specdec_ops.tree_attention: " + message);
}

// Whether a row of the request sees one of the nodes [begin, end).
bool anyone_sees(const TreeAttentionParams& p, int b, const Request& r, int begin, int end) {
  const int64_t tree = p.topology_batch == 1 ? 0 : int64_t(b) * p.nodes;
  for (int node = r.first_node + r.first_row; node < r.first_node + r.end_row; node++)
    for (int other = begin; other < std::min(end, node + 1); other++) {
      const uint64_t ancestors = p.ancestors[(tree + node) * p.words + other / 64];
      const bool near = p.window == 0 || int64_t(p.depths[tree + node]) - p.depths[tree + other] < p.window;
      if (near && (ancestors >> other % 64 & 1) != 0) return true;
    }
  return false;
}

// The first context slot that a row of the request sees.
int first_seen(const TreeAttentionParams& p, int b, const Request& r) {
  if (p.window == 0) return 0;
  int lowest = 0;
  if (p.depths) {
    const int32_t* depths = p.depths + (p.topology_batch == 1 ? 0 : int64_t(b) * p.nodes) + r.first_node;
    lowest = *std::min_element(depths + r.first_row, depths + r.end_row);
  }
  return int(std::clamp(int64_t(r.context_len) + lowest - p.window + 1, int64_t(0), int64_t(r.context_len)));
}

// Refuses a page that does not exist and that a row of the request sees. Others may hold anything: freed ones before
// the window, those of nodes that nobody asks for.
void check_pages(const TreeAttentionParams& p, int b, const Request& r) {
  const int first = first_seen(p, b, r);
  for (int page = first / p.page_size; int64_t(page) * p.page_size < r.slots; page++) {
    const int id = read_once(p.page_table + b * p.page_table_stride + page);
    if (id >= 0 && id < p.pages) continue;
    const int begin = std::max(page * p.page_size, first);
    const int end = int(std::min(int64_t(page + 1) * p.page_size, int64_t(r.slots)));
    const int context_len = r.context_len;
    if (begin < context_len || anyone_sees(p, b, r, begin - context_len, end - context_len))
      refuse("page_table[" + std::to_string(b) + ", " + std::to_string(page) + "] must be a page below " +
             std::to_string(p.pages) + ", got " + std::to_string(id));
  }
}

// Packed rows of a request, and whether their numbers make sense.
void read_offsets(const TreeAttentionParams& p, int b, Request& r) {
  const int begin = read_once(p.offsets + b), end = read_once(p.offsets + b + 1);
  if (end < begin || begin < 0 || end > p.queries)
    refuse("topology.offsets must rise from at least 0 to at most " + std::to_string(p.queries) + " rows, got " +
           std::to_string(begin) + " and " + std::to_string(end) + " at [" + std::to_string(b) + "]");
  r.first_query = begin;
  r.queries = end - begin;
}

}  // namespace

Request read_request(const TreeAttentionParams& p, int b) {
  Request r{};
  r.queries = p.queries;
  if (p.offsets) read_offsets(p, b, r);
  const std::string which = "[" + std::to_string(b) + "]";
  r.context_len = read_once(p.context_lens + b);
  if (r.context_len < 0) refuse("context_lens" + which + " must not be negative, got " + std::to_string(r.context_len));
  int64_t slots = r.context_len;
  r.end_row = r.queries;
  if (p.ancestors) {
    constexpr int64_t kFar = 1 << 30;  // further out there are no nodes; lengths below may add up without overflow
    const int64_t first_node = int64_t(p.query_start) + (p.query_starts ? read_once(p.query_starts + b) : 0);
    r.first_node = int(std::clamp(first_node, -kFar, kFar));
    const int nodes = std::clamp(read_once(p.num_nodes + (p.topology_batch == 1 ? 0 : b)), 0, p.nodes);
    if (p.offsets) r.end_row = std::min(r.end_row, p.nodes);
    r.first_row = std::clamp(-r.first_node, 0, r.end_row);
    r.end_row = std::clamp(nodes - r.first_node, r.first_row, r.end_row);
    // A node sees none that come after it, so slots beyond the last query's node need not hold anything yet.
    if (r.end_row > r.first_row) slots += r.first_node + r.end_row;
  }
  if (slots > p.slots)
    refuse("context_lens" + which + " is " + std::to_string(r.context_len) + " and with its tree it needs " +
           std::to_string(slots) + " slots, but the cache has " + std::to_string(p.slots));
  r.slots = int(slots);
  if (p.page_table && r.end_row > r.first_row) check_pages(p, b, r);
  return r;
}

void blank_rows_of_nobody(const TreeAttentionParams& p) {
  if (!p.offsets || p.batch == 0) return;
  const int64_t begin = std::clamp(read_once(p.offsets), 0, p.queries);
  for (int64_t row = 0; row < begin; row++) blank_row(p, 0, row);
  for (int64_t row = std::max(read_once(p.offsets + p.batch), 0); row < p.queries; row++) blank_row(p, 0, row);
}

void blank_row(const TreeAttentionParams& p, int b, int64_t row) {
  const size_t element = element_bytes(p.dtype);
  for (int h = 0; h < p.heads; h++) {
    char* out = static_cast<char*>(p.out) +
                (b * p.out_stride_batch + row * p.out_stride_row + h * p.out_stride_head) * int64_t(element);
    std::fill(out, out + p.dim * element, char(0));  // all-zero bits are 0 in every dtype
    if (p.lse) p.lse[((p.offsets ? 0 : int64_t(b) * p.queries) + row) * p.heads + h] = -INFINITY;
  }
}

}  // namespace specdec::cpu

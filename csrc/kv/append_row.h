// Where a row of kv_append goes, and by what position it turns: decided here for CPU and GPU alike.
//
// Numbers on the device are not checked by anybody before this. They are compared as 64-bit integers, so that no sum of
// them wraps around, and every index is inside of its tensor before something is read with it.
#pragma once

#include <cstdint>

#include "common/philox.h"
#include "kv/params.h"

namespace specdec {

struct AppendRow {
  int64_t position;     // 0 without rotation; -1: the row has no node or no position
  int32_t first, slot;  // the request or page in the cache, and the slot in it; first -1: the row is not stored
};

// The last request that starts at this row or before it, or -1.
SPECDEC_HOST_DEVICE int32_t request_by_offsets(const int32_t* offsets, int32_t batch, int64_t row) {
  int32_t low = 0, high = batch + 1;  // how many offsets are at most `row`
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (offsets[middle] <= row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low - 1 < batch ? low - 1 : -1;
}

SPECDEC_HOST_DEVICE AppendRow find_append_row(const KvAppendParams& p, int64_t row) {
  AppendRow found = {-1, -1, 0};
  const bool has_nodes = p.packed == 0 || p.offsets != nullptr;
  int64_t request = 0, within = 0;  // the row's number in its request
  if (p.packed == 0) {
    request = row / p.queries;
    within = row - request * p.queries;
  } else if (p.offsets != nullptr) {
    request = request_by_offsets(p.offsets, p.batch, row);
    within = request < 0 ? 0 : row - p.offsets[request];
  } else if (p.requests != nullptr) {
    request = read_once(p.requests + row);
  }
  const bool known = request >= 0 && request < p.batch;
  int64_t node = 0, depth = 0, context = 0;
  if (has_nodes) {
    if (!known) return found;
    node = int64_t(p.query_start) + within + (p.query_starts != nullptr ? p.query_starts[request] : 0);
    if (node < 0) return found;
    depth = node;
    if (p.depths != nullptr) {
      const int64_t tree = p.topology_batch > 1 ? request : 0;
      if (node >= p.nodes || node >= p.num_nodes[tree] || (p.offsets != nullptr && within >= p.nodes)) return found;
      depth = read_once(p.depths + tree * p.nodes + node);
    }
    if (p.context_lens != nullptr) {
      context = read_once(p.context_lens + request);
      if (context < 0) return found;
    }
  }
  if (p.cosines != nullptr) {
    const int64_t position = p.positions != nullptr ? read_once(p.positions + row) : context + depth;
    if (position < 0 || position >= p.table_positions) return found;
    found.position = position;
  } else {
    found.position = 0;
  }
  const int64_t slot = p.slots != nullptr ? read_once(p.slots + row) : context + node;
  if (!known || slot < 0 || slot >= p.slots_each) return found;
  if (p.page_table == nullptr) {
    found.first = int32_t(request), found.slot = int32_t(slot);
    return found;
  }
  const int32_t page = read_once(p.page_table + request * (p.slots_each / p.page_size) + slot / p.page_size);
  if (page < 0 || page >= p.pages) return found;
  found.first = page, found.slot = int32_t(slot % p.page_size);
  return found;
}

}  // namespace specdec

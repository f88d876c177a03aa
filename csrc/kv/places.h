// Where a slot of a request lies in a layer's cache, and the moves of an accepted path. CPU and GPU alike.
//
// An accepted path has nodes n_0 < n_1 < n_2 ..., and row `context + n_i` moves to row `context + i`. Strictly ascending
// numbers from 0 on have n_i >= i. So one owner of a column of bytes may make the moves in place, in their order:
//   - what move i reads, at n_i, no earlier move k < i has written: it wrote at k < i <= n_i;
//   - what move i writes, at i, no later move k > i reads: it reads at n_k >= k > i.
// Hence several moves may also be read before the first of them is written. Nothing is staged, and owners of different
// columns need not wait for each other. A path that does not ascend, or leads out of the cache or to a page that is not
// there, ends before that move: what would have been read is then not known to be what was meant.
#pragma once

#include "kv/params.h"

#if defined(__CUDACC__)
#define SPECDEC_KV __host__ __device__ __forceinline__
#else
#define SPECDEC_KV inline
#endif

namespace specdec {

// A request or a page, and a slot of it. first -1: nowhere.
struct KvCachePlace {
  int32_t first, slot;
};

// The slot is below 2^32 wherever it comes from.
SPECDEC_KV KvCachePlace cache_place(const KvCacheLayer& layer, int32_t request, int64_t slot) {
  if (layer.max_pages < 0)
    return slot >= 0 && slot < layer.page_size ? KvCachePlace{request, int32_t(slot)} : KvCachePlace{-1, 0};
  if (slot < 0 || slot >= int64_t(layer.max_pages) * layer.page_size) return {-1, 0};
  const uint32_t size = uint32_t(layer.page_size), column = uint32_t(slot) / size;
  const int32_t page = read_once(layer.page_table + int64_t(request) * layer.max_pages + column);
  if (page < 0 || page >= layer.first) return {-1, 0};
  return {page, int32_t(uint32_t(slot) - column * size)};
}

struct KvMove {
  KvCachePlace from, to;
};

// The moves of one request in one layer. Those that would leave a row where it is are left out.
class KvPath {
 public:
  SPECDEC_KV KvPath(const KvCommitParams& p, const KvCacheLayer& layer, int32_t request)
      : layer_(layer),
        nodes_(p.nodes + int64_t(request) * p.steps),
        request_(request),
        start_(p.context_lens[request]) {
    end_ = start_ < 0 ? 0 : p.steps;
  }

  // The next move. False at the end of the path.
  SPECDEC_KV bool next(KvMove& move) {
    while (rank_ < end_) {
      const int32_t rank = rank_++, node = read_once(nodes_ + rank);
      if (node <= last_) break;
      last_ = node;
      if (node == rank) continue;
      move = {cache_place(layer_, request_, int64_t(start_) + node),
              cache_place(layer_, request_, int64_t(start_) + rank)};
      if (move.from.first < 0 || move.to.first < 0) break;
      return true;
    }
    end_ = 0;
    return false;
  }

 private:
  const KvCacheLayer& layer_;
  const int32_t* nodes_;
  int32_t request_, start_, end_, rank_ = 0, last_ = -1;
};

}  // namespace specdec

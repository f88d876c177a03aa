// Moves accepted rows and copies pages on the CPU: a thread owns a layer of a request, K and V, and makes its moves in
// their order, which is why they may be in place (kv/places.h). Heads that lie side by side move as one piece.
//
// Pages come first, and a layer's pages are one thread's: what a copy reads may be what an earlier one wrote.
// Bytes: each row and page that moves is read once and written once, as what it is; no dtype is known here.
#include <algorithm>
#include <cstring>
#include <initializer_list>

#include "common/cpu/thread_pool.h"
#include "kv/cpu/entry_points.h"
#include "kv/places.h"

namespace specdec {

using namespace cpu;

namespace {

constexpr int64_t kBytesPerThread = 1 << 19;  // below this many another thread does not pay

// K or V of a layer.
struct Plane {
  char* cache;
  int64_t stride_first, stride_slot, stride_head, bytes;
  int32_t heads;

  explicit Plane(const KvCacheLayer& l, bool is_v)
      : cache(static_cast<char*>(is_v ? l.v_cache : l.k_cache)),
        stride_first(is_v ? l.v_stride_first : l.k_stride_first),
        stride_slot(is_v ? l.v_stride_slot : l.k_stride_slot),
        stride_head(is_v ? l.v_stride_head : l.k_stride_head),
        bytes(is_v ? l.v_bytes : l.k_bytes),
        heads(l.kv_heads) {
    if (stride_head == bytes) bytes *= heads, heads = 1;
  }

  char* at(KvCachePlace place) const { return cache + place.first * stride_first + place.slot * stride_slot; }

  void move(KvCachePlace from, KvCachePlace to) const {
    const char* source = at(from);
    char* target = at(to);
    if (source == target) return;  // pages that repeat
    for (int32_t head = 0; head < heads; ++head, source += stride_head, target += stride_head) {
      std::memcpy(target, source, bytes);
    }
  }
};

void copy_pages(const KvCommitParams& p, const KvCacheLayer& layer) {
  if (layer.max_pages < 0) return;
  for (const bool is_v : {false, true}) {
    const Plane plane(layer, is_v);
    for (int32_t i = 0; i < p.copy_count; ++i) {
      const int32_t source = read_once(p.copies + 2 * i), target = read_once(p.copies + 2 * i + 1);
      if (source < 0 || source >= layer.first || target < 0 || target >= layer.first) continue;
      for (int32_t slot = 0; slot < layer.page_size; ++slot) plane.move({source, slot}, {target, slot});
    }
  }
}

void commit_path(const KvCommitParams& p, const KvCacheLayer& layer, int32_t request) {
  const Plane k(layer, false), v(layer, true);
  KvPath path(p, layer, request);
  KvMove move;
  while (path.next(move)) k.move(move.from, move.to), v.move(move.from, move.to);
}

}  // namespace

void kv_commit_cpu(const KvCommitParams& p, int threads) {
  const auto threads_for = [threads](double bytes) {
    return ThreadPool(int(std::max(1.0, std::min<double>(threads, bytes / kBytesPerThread))));
  };
  const KvCacheLayer& first = p.layers[0];
  const double row = double(first.kv_heads) * (first.k_bytes + first.v_bytes);
  if (p.copy_count > 0) {
    const ThreadPool pool = threads_for(row * first.page_size * p.copy_count * p.count);
    pool.deal(p.count, [&](int64_t layer) { copy_pages(p, p.layers[layer]); });
  }
  const ThreadPool pool = threads_for(row * p.steps * p.batch * p.count);
  pool.deal(int64_t(p.count) * p.batch,
            [&](int64_t task) { commit_path(p, p.layers[task / p.batch], int32_t(task % p.batch)); });
}

}  // namespace specdec

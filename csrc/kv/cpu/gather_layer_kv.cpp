// Gathers K and V of all layers into rows on the CPU. A task is a tile of rows: it goes through the layers, and in each
// through its rows, so that slots which follow one another are read in the order in which they lie.
//
// Bytes: every slot asked for is read once, every row written once.
#include <algorithm>
#include <cstring>

#include "common/cpu/thread_pool.h"
#include "kv/cpu/entry_points.h"
#include "kv/places.h"

namespace specdec {

using namespace cpu;

namespace {

constexpr int32_t kTileRows = 8;
constexpr int64_t kBytesPerThread = 1 << 17;  // below this many another thread does not pay

void gather_row(const KvCacheLayer& l, KvCachePlace place, char* out) {
  const int64_t head_bytes = int64_t(l.k_bytes) + l.v_bytes;
  if (place.first < 0) {
    std::memset(out, 0, head_bytes * l.kv_heads);
    return;
  }
  const char* k = static_cast<const char*>(l.k_cache) + place.first * l.k_stride_first + place.slot * l.k_stride_slot;
  const char* v = static_cast<const char*>(l.v_cache) + place.first * l.v_stride_first + place.slot * l.v_stride_slot;
  for (int32_t head = 0; head < l.kv_heads; ++head, out += head_bytes) {
    std::memcpy(out, k + head * l.k_stride_head, l.k_bytes);
    std::memcpy(out + l.k_bytes, v + head * l.v_stride_head, l.v_bytes);
  }
}

}  // namespace

void gather_layer_kv_cpu(const GatherLayerKvParams& p, int threads) {
  const KvCacheLayer& first = p.layers[0];
  const int64_t width = int64_t(first.kv_heads) * (int64_t(first.k_bytes) + first.v_bytes);
  const double bytes = double(width) * p.count * p.rows;
  const ThreadPool pool(int(std::max(1.0, std::min<double>(threads, bytes / kBytesPerThread))));
  pool.deal((p.rows + kTileRows - 1) / kTileRows, [&](int64_t tile) {
    const int32_t begin = int32_t(tile) * kTileRows, end = std::min(p.rows, begin + kTileRows);
    for (int32_t at = 0; at < p.count; ++at) {
      for (int32_t row = begin; row < end; ++row) {
        const int32_t request = p.requests ? p.requests[row] : 0;
        KvCachePlace place = {-1, 0};
        if (request >= 0 && request < p.batch) place = cache_place(p.layers[at], request, p.slots[row]);
        gather_row(p.layers[at], place, static_cast<char*>(p.out) + row * p.out_stride_row + at * width);
      }
    }
  });
}

}  // namespace specdec

// Gathers K and V of all layers into rows on the CPU. A task is a tile of rows: it goes through the layers, and in each
// through its rows, so that slots which follow one another are read in the order in which they lie. While a row is
// copied, the lines of the one after it are asked for: a row is a few short pieces, at whose ends the processor's own
// prefetching starts anew, and in pages the next one lies anywhere.
//
// Bytes: every slot asked for is read once, every row written once. A result that caches can't hold is written past
// them: an ordinary store would first read from memory what it is about to overwrite, half as much again.
#include <algorithm>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "common/cpu/thread_pool.h"
#include "kv/cpu/entry_points.h"
#include "kv/places.h"

namespace specdec {

using namespace cpu;

namespace {

constexpr int32_t kMaxTileRows = 32;          // more would leave threads without a tile, and read no faster
constexpr int32_t kTilesPerThread = 4;        // at least, where there are rows for them
constexpr int64_t kLine = 64;                 // bytes of a cache line
constexpr int64_t kBytesPerThread = 1 << 17;  // below this many another thread does not pay
constexpr double kPastCaches = 8 << 20;       // bytes of a result from which it is written past the caches

void copy(char* to, const char* from, int64_t bytes) { std::memcpy(to, from, bytes); }

// The same past the caches, of whole units of 64 bytes at multiples of 16.
void copy_past_caches(char* to, const char* from, int64_t bytes) {
#ifdef __SSE2__
  for (int64_t at = 0; at < bytes; at += 64) {
    const __m128i* source = reinterpret_cast<const __m128i*>(from + at);
    __m128i* target = reinterpret_cast<__m128i*>(to + at);
    const __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
    const __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
    _mm_stream_si128(target, a), _mm_stream_si128(target + 1, b);
    _mm_stream_si128(target + 2, c), _mm_stream_si128(target + 3, d);
  }
#else
  std::memcpy(to, from, bytes);
#endif
}

// Others must see what was written past the caches.
void finish_writes() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// Where a row of a layer is read. nullptr: nowhere.
struct Source {
  const char *k, *v;
};

Source source_of(const GatherLayerKvParams& p, const KvCacheLayer& l, int32_t row) {
  const int32_t request = p.requests ? read_once(p.requests + row) : 0;
  if (request < 0 || request >= p.batch) return {nullptr, nullptr};
  const KvCachePlace place = cache_place(l, request, read_once(p.slots + row));
  if (place.first < 0) return {nullptr, nullptr};
  return {static_cast<const char*>(l.k_cache) + place.first * l.k_stride_first + place.slot * l.k_stride_slot,
          static_cast<const char*>(l.v_cache) + place.first * l.v_stride_first + place.slot * l.v_stride_slot};
}

void prefetch(const char* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(from + at);
}

// Writes a row of a layer, and asks for the one that comes next.
template <class Copy>
void gather_row(const KvCacheLayer& l, Source from, const KvCacheLayer& next_layer, Source next, char* out,
                const Copy& copy) {
  const int64_t head_bytes = int64_t(l.k_bytes) + l.v_bytes;
  if (from.k == nullptr) std::memset(out, 0, head_bytes * l.kv_heads);
  for (int32_t head = 0; head < l.kv_heads; ++head, out += head_bytes) {
    if (next.k != nullptr) {
      prefetch(next.k + head * next_layer.k_stride_head, l.k_bytes);
      prefetch(next.v + head * next_layer.v_stride_head, l.v_bytes);
    }
    if (from.k == nullptr) continue;
    copy(out, from.k + head * l.k_stride_head, l.k_bytes);
    copy(out + l.k_bytes, from.v + head * l.v_stride_head, l.v_bytes);
  }
}

// Rows [begin, end) of all layers.
template <class Copy>
void gather_tile(const GatherLayerKvParams& p, int64_t width, int32_t begin, int32_t end, const Copy& copy) {
  Source from = source_of(p, p.layers[0], begin);
  for (int32_t at = 0; at < p.count; ++at) {
    for (int32_t row = begin; row < end; ++row) {
      const bool is_last = row + 1 == end;
      const KvCacheLayer& next_layer = p.layers[is_last && at + 1 < p.count ? at + 1 : at];
      const Source next = source_of(p, next_layer, is_last ? begin : row + 1);
      char* const out = static_cast<char*>(p.out) + row * p.out_stride_row + at * width;
      gather_row(p.layers[at], from, next_layer, next, out, copy);
      from = next;
    }
  }
}

}  // namespace

void gather_layer_kv_cpu(const GatherLayerKvParams& p, int threads) {
  const KvCacheLayer& first = p.layers[0];
  const int64_t width = int64_t(first.kv_heads) * (int64_t(first.k_bytes) + first.v_bytes);
  const double bytes = double(width) * p.count * p.rows;
  const ThreadPool pool(int(std::max(1.0, std::min<double>(threads, bytes / kBytesPerThread))));
  const uintptr_t parts = uintptr_t(first.k_bytes) | uintptr_t(first.v_bytes);
  const uintptr_t out = reinterpret_cast<uintptr_t>(p.out) | uintptr_t(p.out_stride_row);
  const bool past_caches = bytes >= kPastCaches && parts % kLine == 0 && out % 16 == 0;
  const int32_t tiles = pool.threads() * kTilesPerThread;
  const int32_t tile_rows = std::min(kMaxTileRows, (p.rows + tiles - 1) / tiles);
  pool.deal((p.rows + tile_rows - 1) / tile_rows, [&](int64_t tile) {
    const int32_t begin = int32_t(tile) * tile_rows, end = std::min(p.rows, begin + tile_rows);
    if (!past_caches) return gather_tile(p, width, begin, end, copy);
    gather_tile(p, width, begin, end, copy_past_caches);
    finish_writes();
  });
}

}  // namespace specdec

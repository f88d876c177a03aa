// Gathers K and V of all layers into rows on the CPU. A task is a tile of rows: it goes through the layers, and in each
// through its rows, so that slots which follow one another are read in the order in which they lie.
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

constexpr int32_t kTileRows = 8;
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

template <class Copy>
void gather_row(const KvCacheLayer& l, KvCachePlace place, char* out, const Copy& copy) {
  const int64_t head_bytes = int64_t(l.k_bytes) + l.v_bytes;
  if (place.first < 0) {
    std::memset(out, 0, head_bytes * l.kv_heads);
    return;
  }
  const char* k = static_cast<const char*>(l.k_cache) + place.first * l.k_stride_first + place.slot * l.k_stride_slot;
  const char* v = static_cast<const char*>(l.v_cache) + place.first * l.v_stride_first + place.slot * l.v_stride_slot;
  for (int32_t head = 0; head < l.kv_heads; ++head, out += head_bytes) {
    copy(out, k + head * l.k_stride_head, l.k_bytes);
    copy(out + l.k_bytes, v + head * l.v_stride_head, l.v_bytes);
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
  const bool past_caches = bytes >= kPastCaches && parts % 64 == 0 && out % 16 == 0;
  pool.deal((p.rows + kTileRows - 1) / kTileRows, [&](int64_t tile) {
    const int32_t begin = int32_t(tile) * kTileRows, end = std::min(p.rows, begin + kTileRows);
    for (int32_t at = 0; at < p.count; ++at) {
      for (int32_t row = begin; row < end; ++row) {
        const int32_t request = p.requests ? read_once(p.requests + row) : 0;
        KvCachePlace place = {-1, 0};
        if (request >= 0 && request < p.batch) place = cache_place(p.layers[at], request, read_once(p.slots + row));
        char* const to = static_cast<char*>(p.out) + row * p.out_stride_row + at * width;
        past_caches ? gather_row(p.layers[at], place, to, copy_past_caches) : gather_row(p.layers[at], place, to, copy);
      }
    }
    if (past_caches) finish_writes();
  });
}

}  // namespace specdec

// Counts every byte of global memory that a kernel reads and writes.
//
// The kernel is compiled for ThreadSanitizer, which puts a call before each access, and gets these functions in place
// of ThreadSanitizer's own. What threads read at the same address counts once for each of them, where a GPU may read it
// once for a warp. An asynchronous copy counts once, for the bytes that it reads.
#include <cstddef>
#include <cstdint>
#include <vector>

namespace {

struct Watched {
  uintptr_t begin, end;
  uint64_t bytes_read, bytes_written;
};
std::vector<Watched> watched;

void count_read(const volatile void* address, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(address);
  for (Watched& piece : watched) {
    if (first >= piece.begin && first < piece.end) piece.bytes_read += bytes;
  }
}

void count_write(const volatile void* address, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(address);
  for (Watched& piece : watched) {
    if (first >= piece.begin && first < piece.end) piece.bytes_written += bytes;
  }
}

}  // namespace

#define SPECDEC_EXPORT extern "C" __attribute__((visibility("default")))

SPECDEC_EXPORT void specdec_watch(const void* begin, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(begin);
  watched.push_back({first, first + bytes, 0, 0});
}
// In the order of the calls of specdec_watch.
SPECDEC_EXPORT uint64_t specdec_bytes_read(size_t index) { return watched[index].bytes_read; }
SPECDEC_EXPORT uint64_t specdec_bytes_written(size_t index) { return watched[index].bytes_written; }
SPECDEC_EXPORT void specdec_forget_watched() { watched.clear(); }

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(void* address, size_t bytes) { count_read(address, bytes); }
void __tsan_write_range(void* address, size_t bytes) { count_write(address, bytes); }

#define SPECDEC_ACCESS(name, bytes)                                               \
  void __tsan_read##name(void* address) { count_read(address, bytes); }           \
  void __tsan_write##name(void* address) { count_write(address, bytes); }         \
  void __tsan_unaligned_read##name(void* address) { count_read(address, bytes); } \
  void __tsan_unaligned_write##name(void* address) { count_write(address, bytes); }
SPECDEC_ACCESS(1, 1)
SPECDEC_ACCESS(2, 2)
SPECDEC_ACCESS(4, 4)
SPECDEC_ACCESS(8, 8)
SPECDEC_ACCESS(16, 16)

// Atomics have been replaced by calls. One counts as a read and a write.
#define SPECDEC_ATOMICS(bits, Int)                                                                              \
  Int __tsan_atomic##bits##_load(const volatile Int* address, int) {                                            \
    count_read(address, sizeof(Int));                                                                           \
    return *address;                                                                                            \
  }                                                                                                             \
  Int __tsan_atomic##bits##_fetch_add(volatile Int* address, Int value, int) {                                  \
    count_read(address, sizeof(Int));                                                                           \
    count_write(address, sizeof(Int));                                                                          \
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);                                                \
  }                                                                                                             \
  Int __tsan_atomic##bits##_fetch_or(volatile Int* address, Int value, int) {                                   \
    count_read(address, sizeof(Int));                                                                           \
    count_write(address, sizeof(Int));                                                                          \
    return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);                                                 \
  }                                                                                                             \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile Int* address, Int* expected, Int value, int, int) {  \
    count_read(address, sizeof(Int));                                                                           \
    count_write(address, sizeof(Int));                                                                          \
    return __atomic_compare_exchange_n(address, expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);    \
  }                                                                                                             \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile Int* address, Int* expected, Int value, int order, \
                                                    int failure_order) {                                        \
    return __tsan_atomic##bits##_compare_exchange_weak(address, expected, value, order, failure_order);         \
  }
SPECDEC_ATOMICS(32, int32_t)
SPECDEC_ATOMICS(64, int64_t)
}

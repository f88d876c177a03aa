#include "shared_memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "fiber.h"

namespace specdec::emulator {

namespace {

constexpr size_t kAlignment = 128;

}

// Bytes of 0xff, with no more bytes behind them than asked for, so that AddressSanitizer sees the first one beyond. The
// address has the alignment of the offset and no other.
SharedMemory::Array SharedMemory::make(size_t bytes, size_t offset) {
  const size_t before = offset % kAlignment;
  void* memory = nullptr;
  if (posix_memalign(&memory, kAlignment, before + bytes) != 0) throw std::bad_alloc();
  auto* allocation = static_cast<unsigned char*>(memory);
  std::memset(allocation, 0xff, before + bytes);
  SPECDEC_POISON(allocation, before);
  return {allocation, allocation + before, bytes, offset, 0};
}

void SharedMemory::drop() {
  const auto drop = [&](const Array& array) {
    SPECDEC_UNPOISON(array.allocation, size_t(array.begin - array.allocation) + array.bytes);
    old_arrays_.push_back(array.allocation);
  };
  for (const auto& [key, array] : static_arrays_) drop(array);
  for (const auto& array : dynamic_arrays_) drop(array);
  static_arrays_.clear();
  dynamic_arrays_.clear();
#ifndef SPECDEC_EMULATOR_TSAN
  free_old();  // ThreadSanitizer must not see an address twice in a launch, and take two blocks' use for a race
#endif
}

void SharedMemory::free_old() {
  for (unsigned char* array : old_arrays_) std::free(array);
  old_arrays_.clear();
}

void* SharedMemory::of_kernel(const void* key, size_t bytes) {
  Array* array = nullptr;
  Fiber::as_scheduler([&] {
    const auto [place, is_new] = static_arrays_.try_emplace(key);
    array = &place->second;
    if (!is_new) return;
    *array = make(bytes, 0);
    release(&array->created);
  });
  acquire(&array->created);
  return array->begin;
}

void* SharedMemory::of_launch(int index, size_t offset, size_t bytes, size_t size, Site site) {
  if (offset + bytes > size) {
    fail(site, "an array in shared memory ends at byte %zu, the launch asked for %zu bytes", offset + bytes, size);
  }
  if (index == int(dynamic_arrays_.size())) {
    Fiber::as_scheduler([&] {
      dynamic_arrays_.push_back(make(bytes, offset));
      release(&dynamic_arrays_.back().created);
    });
  }
  Array& array = dynamic_arrays_[index];
  if (array.bytes != bytes || array.offset != offset) {
    fail(site, "threads cut the shared memory into different arrays");
  }
  acquire(&array.created);
  return array.begin;
}

bool SharedMemory::contains(const void* address, size_t bytes) const {
  const auto* first = static_cast<const unsigned char*>(address);
  const auto has = [&](const Array& array) {
    return first >= array.begin && first + bytes <= array.begin + array.bytes;
  };
  return std::any_of(dynamic_arrays_.begin(), dynamic_arrays_.end(), has) ||
         std::any_of(static_arrays_.begin(), static_arrays_.end(), [&](const auto& item) { return has(item.second); });
}

}  // namespace specdec::emulator

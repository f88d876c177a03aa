#pragma once

#include <cstddef>
#include <cstdint>

namespace specdec {

// Reads a buffer once, on this many threads, and returns the exclusive or of its words.
uint64_t read_bytes(const void* address, size_t bytes, int threads);

// Flushes a buffer from every cache. False where the processor offers no way to do it.
bool evict_from_cache(const void* address, size_t bytes);

}  // namespace specdec

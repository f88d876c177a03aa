// The shared memory of a block: every array is an allocation of its own, so that a sanitizer sees where it ends.
#pragma once

#include <cstddef>
#include <deque>
#include <map>
#include <vector>

#include "emulator.h"

namespace specdec::emulator {

class SharedMemory {
 public:
  SharedMemory() = default;
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory() { free_old(); }

  // Arrays whose size the kernel states, and those it cuts out of the `size` bytes that the launch asks for.
  void* of_kernel(const void* key, size_t bytes);
  void* of_launch(int index, size_t offset, size_t bytes, size_t size, Site);
  bool contains(const void* address, size_t bytes) const;  // within one array

  void drop();      // at the end of a block
  void free_old();  // at the end of a launch

 private:
  struct Array {
    unsigned char* allocation;
    unsigned char* begin;
    size_t bytes, offset;
    char created;  // orders its first bytes before every use
  };
  static Array make(size_t bytes, size_t offset);

  std::map<const void*, Array> static_arrays_;
  std::deque<Array> dynamic_arrays_;
  std::vector<unsigned char*> old_arrays_;
};

}  // namespace specdec::emulator

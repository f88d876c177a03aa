// Scratch of a call.
#pragma once

#include <cstddef>
#include <new>

namespace specdec::cpu {

// Floats on a cache line's boundary.
class Buffer {
 public:
  explicit Buffer(size_t floats) : data_(static_cast<float*>(::operator new[](floats * sizeof(float), kLine))) {}
  ~Buffer() { ::operator delete[](data_, kLine); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* get() const { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  float* data_;
};

}  // namespace specdec::cpu

// What all CUDA launchers share: the layout of scratch, and errors in words.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "common/types.h"

namespace specdec {

// Lays out a call's scratch: parts one after the other, each at a multiple of 16 bytes.
class ScratchLayout {
 public:
  // Where the next part begins, of `count` things.
  template <class T>
  int64_t take(int64_t count) {
    const int64_t begin = end_;
    end_ += (count * int64_t(sizeof(T)) + 15) / 16 * 16;
    return begin;
  }
  int64_t bytes() const { return end_; }

 private:
  int64_t end_ = 0;
};

// One helpful sentence for an error of a launch on this device.
std::string explain(cudaError_t error, int device);

// Why this device can't run the compiled kernels (no driver, no such device, not built for its architecture), or "".
std::string cuda_device_error(int device);

}  // namespace specdec

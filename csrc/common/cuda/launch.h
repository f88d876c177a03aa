// What all CUDA launchers share: what a launch is given, the layout of scratch, and errors in words.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "common/types.h"

namespace specdec {

// What a launch is given besides its parameters.
struct CallMemory {
  uint8_t* scratch;         // may hold anything; belongs to one call until it has run
  int32_t* counters;        // zero before the first call; every call leaves zeros; of one stream at a time
  int32_t multiprocessors;  // of the device
  int32_t path;             // for tests: which of several ways the launcher takes; 0 leaves it to the launcher
};

// What a launcher takes: an op's parameters, and memory where it needs any.
template <class Params>
const Params& launch_of(const Params& params, const CallMemory&) {
  return params;
}

// For launchers that take a struct of their own: the parameters are its `call`.
template <class Launch, class Params>
Launch with_memory(const Params& params, const CallMemory& memory) {
  Launch launch{};
  launch.call = params;
  launch.scratch = memory.scratch;
  launch.counters = memory.counters;
  return launch;
}
template <class Launch, class Params>
Launch with_multiprocessors(const Params& params, const CallMemory& memory) {
  Launch launch = with_memory<Launch>(params, memory);
  launch.multiprocessors = memory.multiprocessors;
  return launch;
}

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

// What a stream is, whatever its handle was before: a number that no other one has or had (before CUDA 12 the handle
// itself), and whether its calls are being captured into a graph.
struct StreamState {
  uint64_t id;
  bool captured;
};
StreamState stream_state(cudaStream_t stream);

// Bytes of zeros on a device that are never freed. It may be called while a stream is captured, and waits for none of
// the caller's work.
cudaError_t zeroed_memory(int device, size_t bytes, void** memory);

// One helpful sentence for an error of a launch on this device.
std::string explain(cudaError_t error, int device);

// Why this device can't run the compiled kernels (no driver, no such device, not built for its architecture), or "".
std::string cuda_device_error(int device);

}  // namespace specdec

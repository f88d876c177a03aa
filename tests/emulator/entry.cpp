// The library that Python calls: one op's CUDA launcher, run by the emulator. The macros SPECDEC_LAUNCHER and
// SPECDEC_PARAMS name the launcher and its parameters, SPECDEC_SCRATCH what says how much memory a call needs.
#include <mutex>
#include <stdexcept>
#include <string>

#include "acceptance/cuda/launchers.h"
#include "attention/cuda/launchers.h"
#include "early_exit/cuda/launchers.h"
#include "emulator.h"
#include "kv/cuda/launchers.h"
#include "linear/cuda/launchers.h"
#include "topology/cuda/launchers.h"

#define SPECDEC_EXPORT extern "C" __attribute__((visibility("default")))

using namespace specdec;

// What a call hands over, in one piece: the bytes that the compiled module gives for it, then what memory it has.
struct GivenCall {
  SPECDEC_PARAMS params;
  alignas(8) CallMemory memory;
};

SPECDEC_EXPORT size_t specdec_call_bytes() { return sizeof(GivenCall); }

// Bytes of scratch and zeroed counters that a call needs.
SPECDEC_EXPORT void specdec_scratch([[maybe_unused]] const void* call, int64_t* sizes) {
#ifdef SPECDEC_SCRATCH
  const auto& given = *static_cast<const GivenCall*>(call);
  const CallScratch needed = SPECDEC_SCRATCH(launch_of(given.params, given.memory));
#else
  const CallScratch needed{};
#endif
  sizes[0] = needed.bytes;
  sizes[1] = needed.counters;
}

SPECDEC_EXPORT uint64_t specdec_launches() { return emulator::launches(); }

SPECDEC_EXPORT uint64_t specdec_permissions_asked() { return emulator::permissions_asked(); }

SPECDEC_EXPORT void specdec_grant(size_t shared_bytes) { emulator::shared_bytes_per_block() = shared_bytes; }

// Returns nullptr, or what went wrong. The text is good until the next call.
SPECDEC_EXPORT const char* specdec_run(const void* call, int order, uint64_t seed) {
  static std::mutex one_at_a_time;  // Python lets other threads run meanwhile
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  static std::string message;
  emulator::options() = {static_cast<emulator::Order>(order), seed};
  try {
    const auto& given = *static_cast<const GivenCall*>(call);
    const cudaError_t error = SPECDEC_LAUNCHER(launch_of(given.params, given.memory), 0, nullptr);
    if (error == cudaSuccess) return nullptr;
    message = "CUDA error " + std::to_string(error);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

// The library that Python calls: one op's CUDA launcher, run by the emulator. The macros SPECDEC_LAUNCHER and
// SPECDEC_PARAMS name the launcher and its parameters.
#include <mutex>
#include <stdexcept>
#include <string>

#include "acceptance/cuda/launchers.h"
#include "attention/cuda/launchers.h"
#include "early_exit/cuda/launchers.h"
#include "emulator.h"
#include "kv/cuda/launchers.h"
#include "topology/cuda/launchers.h"

#define SPECDEC_EXPORT extern "C" __attribute__((visibility("default")))

using namespace specdec;

SPECDEC_EXPORT size_t specdec_params_bytes() { return sizeof(SPECDEC_PARAMS); }

#ifdef SPECDEC_SCRATCH
// Bytes (or numbers) of scratch and zeroed counters that a call needs.
SPECDEC_EXPORT void specdec_scratch(const void* params, int64_t* sizes) {
  const auto [scratch, counters] = SPECDEC_SCRATCH(*static_cast<const SPECDEC_PARAMS*>(params));
  sizes[0] = scratch;
  sizes[1] = counters;
}
#endif

SPECDEC_EXPORT uint64_t specdec_launches() { return emulator::launches(); }

SPECDEC_EXPORT void specdec_grant(size_t shared_bytes) { emulator::shared_bytes_per_block() = shared_bytes; }

// Returns nullptr, or what went wrong. The text is good until the next call.
SPECDEC_EXPORT const char* specdec_run(const void* params, int order, uint64_t seed) {
  static std::mutex one_at_a_time;  // Python lets other threads run meanwhile
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  static std::string message;
  emulator::options() = {static_cast<emulator::Order>(order), seed};
  try {
    const cudaError_t error = SPECDEC_LAUNCHER(*static_cast<const SPECDEC_PARAMS*>(params), 0, nullptr);
    if (error == cudaSuccess) return nullptr;
    message = "CUDA error " + std::to_string(error);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

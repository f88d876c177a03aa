// Runs CUDA kernels on a CPU and reports what they do wrong. This is the interface that emulated_device.h stands on.
//
// Every CUDA thread is a fiber with a stack of its own, and one of them runs at a time. A block's threads run depth
// first, warp by warp, in an order that Options choose: a warp goes as far as it can before another one starts, which
// gives the largest distance between warps, and so shows a missing barrier. Blocks run one after another, in that order
// too. An error is a std::runtime_error that names the block, the thread and the line of the kernel; the emulator can
// be used afterwards. What can't be seen from one schedule is left to the sanitizers, for which there are builds of
// their own: AddressSanitizer sees the ends of every array in shared memory, ThreadSanitizer takes each fiber for a
// thread and finds races in every schedule, between blocks as well.
//
// Not emulated: blocks that wait for each other, caches, bank conflicts, occupancy, and the PTX in device.cuh.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define SPECDEC_POISON(address, bytes) ASAN_POISON_MEMORY_REGION(address, bytes)
#define SPECDEC_UNPOISON(address, bytes) ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#else
#define SPECDEC_POISON(address, bytes) ((void)0)
#define SPECDEC_UNPOISON(address, bytes) ((void)0)
#endif

// As a default argument this is the caller's line.
#define SPECDEC_HERE {__builtin_FILE(), __builtin_LINE()}

namespace specdec::emulator {

// A line of a kernel.
struct Site {
  const char* file;
  int line;
};

enum class Order { kForward, kReverse, kRandom };

struct Options {
  Order order = Order::kForward;
  uint64_t seed = 0;  // of kRandom
};
Options& options();

// What all lanes of a warp do together. From kLoadMatrix on, none may be missing.
enum class Collective : unsigned char {
  kSync,
  kShuffle,
  kBallot,
  kMatch,
  kLoadMatrix,
  kLoadMatrixTransposed,
  kMultiplyBFloat16,
  kMultiplyFloat16,
};
const char* name_of(Collective);

// One lane's part of a collective.
struct Payload {
  uint32_t in[10];
  uint32_t out[4];
  uint32_t from_lane;
};

// Computes `out` of the lanes in the mask. The others are null.
void combine(Collective, uint32_t lanes, Payload* const payloads[32]);

void block_sync(Site);
void group_sync(int barrier, int threads, Site);
void warp_collective(Collective, uint32_t lanes, Payload&, Site);
void device_fence();

// Ends the launch with an error that names the running thread.
[[noreturn]] void fail(Site, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Shared memory. Every array is an allocation of its own and starts as 0xff, which is NaN in every float type.
void* shared_static(const void* key, size_t bytes);
void* shared_dynamic(int index, size_t offset, size_t bytes, Site);
void check_in_shared(const void* address, size_t bytes, const char* what, Site);

// Asynchronous copies of 16 bytes: issued, committed in groups, and carried out by the wait that covers their group.
struct AsyncCopy {
  void* to;
  const void* from;
  uint32_t source_bytes;
  Site site;
};
void copy_issued(AsyncCopy);
void copies_committed();
bool next_copy_to_finish(int groups_left, AsyncCopy&);

// How many launches there have been.
uint64_t& launches();

// What a block may have: of the largest devices, unless a test wants a small one.
size_t& shared_bytes_per_block();

// How often the driver was asked to let a kernel have more than 48 KiB of shared memory.
uint64_t& permissions_asked();
cudaError_t allow_shared_bytes(const void* kernel, size_t bytes);

// Runs body(argument) in every thread of the grid. One launch at a time: the caller sees to that.
cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* argument);

}  // namespace specdec::emulator

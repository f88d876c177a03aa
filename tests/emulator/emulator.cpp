#include "emulator.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cuda/shared_grants.h"
#include "fiber.h"
#include "shared_memory.h"
#include "text.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace specdec::emulator {

namespace {

constexpr int kLanes = 32;
constexpr int kGroupBarriers = 16;

enum class State : unsigned char { kReady, kAtBarrier, kAtGroupBarrier, kAtCollective, kDone };

void thread_main();

// A CUDA thread.
struct Thread {
  Fiber fiber{thread_main};
  State state = State::kDone;
  int index = 0;  // in its block
  uint3 index3{};
  Site site{"", 0};  // where it waits
  Collective collective{};
  uint32_t lanes = 0;
  int barrier = 0, barrier_threads = 0;  // of the group barrier where it waits
  Payload* payload = nullptr;
  std::deque<std::vector<AsyncCopy>> groups;  // committed, the oldest first
  std::vector<AsyncCopy> open_group;

  void restart() {
    fiber.restart();
    groups.clear();
    open_group.clear();
  }
};

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  void (*body)(void*);
  void* argument;
  char started, ended;  // order the threads after what the host did before, and before what it does next
};

// The threads of the blocks that it runs one after another, with the shared memory of the current one.
class Block {
 public:
  void start(Launch*);
  void run(uint64_t linear_index);

  void block_sync(Site);
  void group_sync(int barrier, int threads, Site);
  void warp_collective(Collective, uint32_t lanes, Payload&, Site);
  [[noreturn]] void fail(Site, const char* format, va_list);
  void thread_body();
  size_t shared_bytes() const { return launch_->shared_bytes; }

  SharedMemory shared;
  Thread* current = nullptr;
  std::string error;

 private:
  void begin(uint64_t linear_index);
  bool run_warp(int warp);
  void run_until_stuck_or_done();
  void abandon();
  std::string waiting_threads() const;
  int warps() const { return (count_ + kLanes - 1) / kLanes; }
  bool random() const { return options().order == Order::kRandom; }

  Launch* launch_ = nullptr;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<int> turns_;  // the order of the threads, within their warps
  int count_ = 0, alive_ = 0, arrived_ = 0, barriers_ = 0;
  std::mt19937_64 random_;
  char barrier_[2];  // two, in turn: a thread that is late for one must not meet those that have reached the next
  char warp_sync_[1024 / kLanes];
  struct GroupBarrier {
    int arrived, turns;
    char turn[2];
  } groups_[kGroupBarriers];
};

// ThreadSanitizer takes blocks for unordered only if they are run by different fibers, hence two.
#ifdef SPECDEC_EMULATOR_TSAN
constexpr int kBlocks = 2;
#else
constexpr int kBlocks = 1;
#endif
Block blocks[kBlocks];
Block* running = nullptr;

void complain_of(const std::vector<AsyncCopy>& copies) {
  if (!copies.empty()) fail(copies[0].site, "an asynchronous copy is never waited for");
}

void thread_main() { running->thread_body(); }

void Block::thread_body() {
  for (;;) {  // once per block
    Thread& thread = *current;
    acquire(&launch_->started);
    launch_->body(launch_->argument);
    for (const auto& group : thread.groups) complain_of(group);
    complain_of(thread.open_group);
    release(&launch_->ended);
    thread.state = State::kDone;
    --alive_;
    thread.fiber.yield();
  }
}

void Block::start(Launch* launch) {
  launch_ = launch;
  error.clear();
  count_ = int(launch->block.x * launch->block.y * launch->block.z);
  while (int(threads_.size()) < count_) threads_.push_back(std::make_unique<Thread>());
}

void Block::begin(uint64_t linear_index) {
  const dim3 grid = launch_->grid, block = launch_->block;
  blockIdx = {unsigned(linear_index % grid.x), unsigned(linear_index / grid.x % grid.y),
              unsigned(linear_index / grid.x / grid.y)};
  random_.seed(options().seed * 1000003 + linear_index);
  release(&launch_->started);
  alive_ = count_;
  arrived_ = 0;
  for (auto& group : groups_) group.arrived = group.turns = 0;
  turns_.resize(count_);
  for (int i = 0; i < count_; ++i) {
    Thread& thread = *threads_[i];
    thread.index = i;
    thread.index3 = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    thread.state = State::kReady;
    const int warp_start = i / kLanes * kLanes, warp_end = std::min(count_, warp_start + kLanes);
    turns_[i] = options().order == Order::kReverse ? warp_start + warp_end - 1 - i : i;
  }
}

// Lets a warp go as far as it can, or in random order, for a while. Returns whether any thread has run.
bool Block::run_warp(int warp) {
  const auto first = turns_.begin() + warp * kLanes;
  const auto last = turns_.begin() + std::min(count_, warp * kLanes + kLanes);
  bool any = false;
  for (bool again = true; again && error.empty();) {
    again = false;
    if (random()) std::shuffle(first, last, random_);
    for (auto turn = first; turn != last && error.empty(); ++turn) {
      Thread& thread = *threads_[*turn];
      if (thread.state != State::kReady) continue;
      again = any = true;
      current = &thread;
      threadIdx = thread.index3;
      thread.fiber.resume();
    }
    if (random() && random_() % 256 == 0) break;
  }
  return any;
}

void Block::run_until_stuck_or_done() {
  std::vector<int> order(warps());
  std::iota(order.begin(), order.end(), 0);
  if (options().order == Order::kReverse) std::reverse(order.begin(), order.end());
  while (alive_ > 0 && error.empty()) {
    bool any = false;
    if (random()) std::shuffle(order.begin(), order.end(), random_);
    for (int warp : order) any |= run_warp(warp);
    if (!any) error = "deadlock";
  }
}

void Block::run(uint64_t linear_index) {
  running = this;
  begin(linear_index);
  run_until_stuck_or_done();
  if (!error.empty()) abandon();
  shared.drop();
}

void Block::abandon() {
  char where[96];
  std::snprintf(where, sizeof where, " in block (%u, %u, %u)", blockIdx.x, blockIdx.y, blockIdx.z);
  error += where + waiting_threads();
  for (int i = 0; i < count_; ++i) {
    if (threads_[i]->state != State::kDone) {
      threads_[i]->fiber.as_this_fiber([&] { release(&launch_->ended); });
    }
  }
  for (auto& thread : threads_) thread->restart();
}

std::string Block::waiting_threads() const {
  std::map<std::string, std::vector<int>> groups;
  for (int i = 0; i < count_; ++i) {
    const Thread& thread = *threads_[i];
    std::string what = "exited";
    if (thread.state == State::kReady) what = "can run";
    if (thread.state == State::kAtBarrier) what = "wait in block_sync at " + text(thread.site);
    if (thread.state == State::kAtGroupBarrier) {
      what = "wait in group_sync " + std::to_string(thread.barrier) + " of " + std::to_string(thread.barrier_threads) +
             " threads at " + text(thread.site);
    }
    if (thread.state == State::kAtCollective) {
      char mask[16];
      std::snprintf(mask, sizeof mask, "%08x", thread.lanes);
      what = std::string("wait in ") + name_of(thread.collective) + " of lanes " + mask + " at " + text(thread.site);
    }
    groups[what].push_back(i);
  }
  std::string list;
  for (const auto& [what, threads] : groups) list += "\n  threads " + ranges(threads) + ": " + what;
  return list;
}

void Block::fail(Site site, const char* format, va_list arguments) {
  Fiber::as_scheduler([&] {  // which must own the memory of the message
    char what[512];
    std::vsnprintf(what, sizeof what, format, arguments);
    error = what + (" at " + text(site)) + ", thread " + std::to_string(current->index);
  });
  current->fiber.yield();
  std::abort();  // an abandoned fiber is never resumed
}

void Block::block_sync(Site site) {
  Thread& thread = *current;
  void* barrier = &barrier_[barriers_ & 1];
  release(barrier);
  thread.site = site;
  thread.state = State::kAtBarrier;
  if (++arrived_ < count_) {
    thread.fiber.yield();
  } else {
    for (int i = 0; i < count_; ++i) {
      if (same(threads_[i]->site, site)) continue;
      emulator::fail(site, "divergent barrier: threads meet in different calls of block_sync");
    }
    for (int i = 0; i < count_; ++i) threads_[i]->state = State::kReady;
    arrived_ = 0;
    ++barriers_;
  }
  acquire(barrier);
}

void Block::group_sync(int barrier, int threads, Site site) {
  Thread& thread = *current;
  if (barrier < 1 || barrier >= kGroupBarriers) emulator::fail(site, "there is no group barrier %d", barrier);
  if (threads < 1 || threads > count_ || threads % kLanes != 0) {
    emulator::fail(site, "group_sync of %d threads: not whole warps of the block", threads);
  }
  GroupBarrier& group = groups_[barrier];
  void* turn = &group.turn[group.turns & 1];
  release(turn);
  thread.site = site;
  thread.barrier = barrier;
  thread.barrier_threads = threads;
  thread.state = State::kAtGroupBarrier;
  if (++group.arrived < threads) {
    thread.fiber.yield();
  } else {
    for (int i = 0; i < count_; ++i) {
      Thread& other = *threads_[i];
      if (other.state != State::kAtGroupBarrier || other.barrier != barrier) continue;
      if (other.barrier_threads != threads)
        emulator::fail(site, "threads name different numbers for one group barrier");
      other.state = State::kReady;
    }
    group.arrived = 0;
    ++group.turns;
  }
  acquire(turn);
}

void Block::warp_collective(Collective collective, uint32_t lanes, Payload& payload, Site site) {
  Thread& thread = *current;
  const int warp = thread.index / kLanes, lane = thread.index % kLanes;
  const int size = std::min(kLanes, count_ - warp * kLanes);
  const char* name = name_of(collective);
  if (!(lanes >> lane & 1)) emulator::fail(site, "%s is called by a lane that it does not name", name);
  if (size < kLanes && lanes >> size) emulator::fail(site, "%s names lanes that the block does not have", name);
  thread.collective = collective;
  thread.lanes = lanes;
  thread.payload = &payload;
  thread.site = site;
  thread.state = State::kAtCollective;
  // warp_sync orders memory; shuffles, votes and matrix instructions don't.
  const bool orders = collective == Collective::kSync;
  if (orders) release(&warp_sync_[warp]);

  Payload* payloads[kLanes] = {};
  for (int i = 0; i < size; ++i) {
    if (!(lanes >> i & 1)) continue;
    const Thread& other = *threads_[warp * kLanes + i];
    if (other.state != State::kAtCollective || other.collective != collective || other.lanes != lanes) {
      return thread.fiber.yield();  // and the last one to come does the rest
    }
    payloads[i] = other.payload;
  }
  combine(collective, lanes, payloads);
  for (int i = 0; i < size; ++i) {
    if (!(lanes >> i & 1)) continue;
    Thread& other = *threads_[warp * kLanes + i];
    other.state = State::kReady;
    if (orders) other.fiber.as_this_fiber([&] { acquire(&warp_sync_[warp]); });
  }
}

void run_blocks(Launch& launch) {
  const uint64_t count = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
  std::vector<uint64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (options().order == Order::kReverse) std::reverse(order.begin(), order.end());
  if (options().order == Order::kRandom) std::shuffle(order.begin(), order.end(), std::mt19937_64(options().seed));
  for (auto& block : blocks) block.start(&launch);
  std::string error;
  for (uint64_t turn = 0; turn < count && error.empty(); ++turn) {
    Block& block = blocks[turn % kBlocks];
    block.run(order[turn]);
    error = block.error;
  }
  acquire(&launch.ended);
  for (auto& block : blocks) block.shared.free_old();
  if (!error.empty()) throw std::runtime_error(error);
}

}  // namespace

Options& options() {
  static Options options;
  return options;
}

void fail(Site site, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  running->fail(site, format, arguments);
}

void block_sync(Site site) { running->block_sync(site); }

void group_sync(int barrier, int threads, Site site) { running->group_sync(barrier, threads, site); }

void warp_collective(Collective collective, uint32_t lanes, Payload& payload, Site site) {
  running->warp_collective(collective, lanes, payload, site);
}

void device_fence() {
  static char everyone;  // orders more than a fence does: it may hide a race, and never invents one
  acquire(&everyone);
  release(&everyone);
}

void* shared_static(const void* key, size_t bytes) { return running->shared.of_kernel(key, bytes); }

void* shared_dynamic(int index, size_t offset, size_t bytes, Site site) {
  return running->shared.of_launch(index, offset, bytes, running->shared_bytes(), site);
}

void check_in_shared(const void* address, size_t bytes, const char* what, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail(site, "%s is not aligned to %zu bytes", what, bytes);
  if (!running->shared.contains(address, bytes)) fail(site, "%s is not inside one array in shared memory", what);
}

void copy_issued(AsyncCopy copy) {
  Fiber::as_scheduler([&] { running->current->open_group.push_back(copy); });
}

void copies_committed() {
  Fiber::as_scheduler([&] {
    Thread& thread = *running->current;
    thread.groups.push_back(std::move(thread.open_group));
    thread.open_group.clear();
  });
}

bool next_copy_to_finish(int groups_left, AsyncCopy& copy) {
  bool found = false;
  Fiber::as_scheduler([&] {
    auto& groups = running->current->groups;
    while (int(groups.size()) > groups_left && groups.front().empty()) groups.pop_front();
    if (int(groups.size()) <= groups_left) return;
    found = true;
    copy = groups.front().back();
    groups.front().pop_back();
  });
  return found;
}

uint64_t& launches() {
  static uint64_t count = 0;
  return count;
}

size_t& shared_bytes_per_block() {
  static size_t bytes = 227 * 1024;
  return bytes;
}

uint64_t& permissions_asked() {
  static uint64_t count = 0;
  return count;
}

cudaError_t allow_shared_bytes(const void* kernel, size_t bytes) {
  static cuda::SharedGrants grants;
  return grants.allow(kernel, 0, bytes, [] {
    ++permissions_asked();
    return cudaSuccess;
  });
}

cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* argument) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64) return cudaErrorInvalidConfiguration;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (shared_bytes > shared_bytes_per_block()) return cudaErrorInvalidValue;
  ++launches();
  gridDim = grid;
  blockDim = block;
  Launch launch{grid, block, shared_bytes, body, argument, 0, 0};
  run_blocks(launch);
  return cudaSuccess;
}

}  // namespace specdec::emulator

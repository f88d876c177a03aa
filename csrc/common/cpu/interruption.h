// How a long call is ended from outside, as by Ctrl-C.
//
// The bindings give a call a question to ask; kernels know nothing of it. The calling thread asks it before a share of
// work, ten times a second at most, since only that thread may run a program's signal handlers. If the answer is yes
// that thread throws, and so does each other one before its next share. What the call has written by then is of no use.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace specdec::cpu {

inline int64_t nanoseconds() {
  return int64_t(std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1));
}

struct Interrupted {};

// Of a call; it lives as long as the call.
class Interruption {
 public:
  explicit Interruption(bool (*is_asked_for)()) : is_asked_for_(is_asked_for), before_(current) { current = this; }
  ~Interruption() { current = before_; }
  Interruption(const Interruption&) = delete;
  Interruption& operator=(const Interruption&) = delete;

  // Throws Interrupted if this thread works for a call that is to end.
  static void check() {
    if (current != nullptr) current->check_own();
  }

  // A thread works for a call while this lives.
  class Worker {
   public:
    explicit Worker(Interruption* call) : before_(current) { current = call; }
    ~Worker() { current = before_; }
    Worker(const Worker&) = delete;
    Worker& operator=(const Worker&) = delete;

   private:
    Interruption* const before_;
  };
  static Interruption* of_this_thread() { return current; }

 private:
  static constexpr int64_t kEvery = 100000000;  // 0.1 s
  static inline thread_local Interruption* current = nullptr;
  static inline thread_local char place_;  // whose address tells threads apart

  void check_own() {
    if (stopped_.load(std::memory_order_relaxed)) throw Interrupted();
    if (caller_ != &place_) return;
    const int64_t now = nanoseconds();
    if (next_ == 0) next_ = now + kEvery;
    if (now < next_) return;
    next_ = now + kEvery;
    if (!is_asked_for_()) return;
    stopped_.store(true, std::memory_order_relaxed);
    throw Interrupted();
  }

  bool (*const is_asked_for_)();
  Interruption* const before_;
  const char* const caller_ = &place_;
  int64_t next_ = 0;  // of the calling thread
  std::atomic<bool> stopped_{false};
};

}  // namespace specdec::cpu

// How many threads a team should have while other programs keep some of them from running.
//
// A team's region begins and ends when all of its threads are there. Where another program holds a core, the threads
// that wait spin through the very time that the last one needs to get there, so that a call of 30 us may take 8 ms, whole
// time slices of the scheduler, and each call again. So a region says how long its threads were waited for. After a wait
// that only a scheduler explains, teams have a thread less for as long again, and for twice the last time if that has
// just been tried. A single disturbance costs little, and a program that stays costs a wait in half a second, after
// which the threads are back when it is gone.
//
// No result depends on it: shares of work are the same, whoever does them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace specdec::cpu {

class TeamLimit {
 public:
  // Of the threads that a call asks for, those that it should have. `now`: nanoseconds of any clock.
  int threads(int asked, int64_t now) const {
    if (now >= until_.load(std::memory_order_relaxed)) return asked;
    return std::min(asked, most_.load(std::memory_order_relaxed));
  }

  // Tells of a region: its threads, and for how many nanoseconds one that was there waited, and worked. Shares of work
  // are smaller than the whole, so no wait for the last of them is longer than the work before it.
  void note(int threads, int64_t waited, int64_t worked, int64_t now) {
    if (waited <= worked + kLate) return;
    const int64_t last = pause_.load(std::memory_order_relaxed);
    const bool again = now - waited < until_.load(std::memory_order_relaxed) + last;
    const int64_t pause = std::min(again ? std::max(2 * last, waited) : waited, kLongest);
    most_.store(std::max(threads - 1, 1), std::memory_order_relaxed);
    pause_.store(pause, std::memory_order_relaxed);
    until_.store(now + pause, std::memory_order_relaxed);
  }

 private:
  static constexpr int64_t kLate = 1000000;       // 1 ms: waking a thread takes a twentieth, a time slice several of it
  static constexpr int64_t kLongest = 500000000;  // half a second
  std::atomic<int64_t> until_{-kLongest}, pause_{0};
  std::atomic<int> most_{1};
};

}  // namespace specdec::cpu

// The threads of a call, and how its work is dealt to them: the one place where CPU kernels start threads.
//
// They are OpenMP's, whose pool PyTorch uses as well, so that no two pools fight for the cores. Work is cut into shares
// whose bounds do not depend on the number of threads, and whoever is free takes the next one: a thread that is held up
// holds up a share, not its part of the whole. What is left to wait for is in common/cpu/team_limit.h.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <type_traits>

#include "common/cpu/float_state.h"
#include "common/cpu/interruption.h"
#include "common/cpu/team_limit.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace specdec::cpu {

// As many of the threads as there is work for. Below `per_thread` of it waking another thread takes longer than it saves,
// and on a busy machine much longer.
inline int threads_for(double work, double per_thread, int threads) {
  return int(std::min<double>(std::max(threads, 1), work / per_thread + 1));
}

inline TeamLimit team_limit;  // of the process

// Whether the threads of a team should be done at about the same time, or some have much more to do than others.
enum class Parts { kEven, kUneven };

// The first exception of a team. None may leave a parallel region: it is kept, and thrown where the team was started.
class TeamFailure {
 public:
  template <class Body>
  void guard(const Body& body) {
    try {
      body();
    } catch (...) {
      if (!failed_.exchange(true)) exception_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (exception_) std::rethrow_exception(exception_);
  }

 private:
  std::atomic<bool> failed_{false};
  std::exception_ptr exception_;
};

// Calls body(worker) on as many threads at once, or on fewer: workers count from 0, which is the calling thread. Where
// one throws, the others end what they do, and then the first exception is thrown here.
template <class Body>
void run_team(int threads, const Body& body, Parts parts = Parts::kEven) {
#ifdef _OPENMP
  const int64_t begin = threads > 1 ? nanoseconds() : 0;
  if (threads > 1) threads = team_limit.threads(threads, begin);
  if (threads > 1) {
    int64_t entered = 0, done = 0;
    TeamFailure failure;
    Interruption* const call = Interruption::of_this_thread();
#pragma omp parallel num_threads(threads)
    {
      const IeeeArithmetic arithmetic;
      const Interruption::Worker works_for(call);
      const int worker = omp_get_thread_num();
      if (worker == 0) entered = nanoseconds();
      failure.guard([&] { body(worker); });
      if (worker == 0) done = nanoseconds();
    }
    failure.rethrow();
    const int64_t end = nanoseconds(), for_the_last = parts == Parts::kEven ? end - done : 0;
    team_limit.note(threads, entered - begin + for_the_last, done - entered, end);
    return;
  }
#else
  (void)threads, (void)parts;
#endif
  body(0);
}

// The shares of one phase of a call. A worker gets its shares in ascending order.
class Shares {
 public:
  explicit Shares(int64_t count, int64_t at_once = 1) : count_(count), at_once_(at_once) {}

  // Takes shares as long as there are any: work(share), or work(begin, end) for all that are taken at once.
  template <class Work>
  void take(const Work& work) {
    for (int64_t begin; (begin = next()) < count_;) {
      const int64_t end = std::min(begin + at_once_, count_);
      const Done done{done_, end - begin};
      if constexpr (std::is_invocable_v<Work, int64_t, int64_t>) {
        work(begin, end);
      } else {
        for (int64_t share = begin; share < end; share++) work(share);
      }
    }
  }

  // Waits until those are done, too, that other workers have taken: for the phase that needs them.
  void wait() const {
    constexpr int kSpins = 1 << 10;
    for (int spins = 0; done_.load(std::memory_order_acquire) < count_; spins++) {
      if (spins < kSpins) continue;
      std::this_thread::yield();  // it may be on this thread's core that another one is held up
      Interruption::check();
    }
  }

 private:
  // A call that is to end takes no more.
  int64_t next() {
    Interruption::check();
    return next_.fetch_add(at_once_, std::memory_order_relaxed);
  }

  // Shares count as done even if an exception ends them, or others would wait for them for ever.
  struct Done {
    std::atomic<int64_t>& done;
    const int64_t shares;
    ~Done() { done.fetch_add(shares, std::memory_order_release); }
  };

  const int64_t count_, at_once_;
  std::atomic<int64_t> next_{0}, done_{0};
};

// Calls work(share) for each of `count` shares, on as many threads as given.
template <class Work>
void deal(int threads, int64_t count, const Work& work) {
  Shares shares(count);
  run_team(int(std::min<int64_t>(threads, count)), [&](int) { shares.take(work); });
}

// The threads that work on one row. A row is cut into chunks whose size does not depend on their number.
class ThreadPool {
 public:
  explicit ThreadPool(int threads) : threads_(threads) {}
  int threads() const { return threads_; }

  // Calls work(chunk) for every chunk.
  template <class Work>
  void deal(int64_t chunks, const Work& work) const {
    run(chunks, [&](int64_t chunk, int) { work(chunk); });
  }

  // Calls work(chunk, worker) for every chunk; a worker gets its chunks in ascending order.
  template <class Work>
  void run(int64_t chunks, const Work& work) const {
    // Two chunks take about as long as waking a thread on a busy machine.
    const int threads = chunks > 2 ? int(std::min<int64_t>(threads_, chunks)) : 1;
    Shares shares(chunks);
    run_team(threads, [&](int worker) { shares.take([&](int64_t chunk) { work(chunk, worker); }); });
  }

 private:
  int threads_;
};

}  // namespace specdec::cpu

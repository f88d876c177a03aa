// The threads that work on one row. A row is cut into chunks whose size does not depend on their number.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace specdec::cpu {

// As many of the threads as there is work for. Below `per_thread` of it waking another thread takes longer than it saves,
// and on a busy machine much longer.
inline int threads_for(double work, double per_thread, int threads) {
  return int(std::min<double>(std::max(threads, 1), work / per_thread + 1));
}

class ThreadPool {
 public:
  explicit ThreadPool(int threads) : threads_(threads) {}
  int threads() const { return threads_; }

  // Calls work(chunk) for every chunk; whoever is free takes the next one.
  template <class Work>
  void deal(int64_t chunks, const Work& work) const {
#ifdef _OPENMP
    if (threads_ > 1 && chunks > 2) {
      const int threads = chunks < threads_ ? int(chunks) : threads_;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
      for (int64_t chunk = 0; chunk < chunks; chunk++) work(chunk);
      return;
    }
#endif
    for (int64_t chunk = 0; chunk < chunks; chunk++) work(chunk);
  }

  // Calls work(chunk, worker) for every chunk; a worker gets its chunks in ascending order.
  template <class Work>
  void run(int64_t chunks, const Work& work) const {
#ifdef _OPENMP
    if (threads_ > 1 && chunks > 2) {  // two chunks take about as long as waking a thread on a busy machine
      const int threads = chunks < threads_ ? int(chunks) : threads_;
#pragma omp parallel for num_threads(threads) schedule(static)
      for (int64_t chunk = 0; chunk < chunks; chunk++) work(chunk, omp_get_thread_num());
      return;
    }
#endif
    for (int64_t chunk = 0; chunk < chunks; chunk++) work(chunk, 0);
  }

 private:
  int threads_;
};

}  // namespace specdec::cpu

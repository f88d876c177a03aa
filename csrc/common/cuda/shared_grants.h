// Which kernels may have how much dynamic shared memory beyond 48 KiB, on which device: the driver is asked once for
// each, and again where a later launch needs more. It keeps what it grants as long as the process.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <utility>

namespace specdec::cuda {

class SharedGrants {
 public:
  // ask(): the driver's answer to "may this kernel have so many bytes", 0 for yes. Returns 0 or its error.
  template <class Ask>
  auto allow(const void* kernel, int device, size_t bytes, const Ask& ask) -> decltype(ask()) {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t& granted = granted_[{kernel, device}];
    if (bytes <= granted) return {};
    const auto error = ask();
    if (error == decltype(ask()){}) granted = bytes;
    return error;
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<const void*, int>, size_t> granted_;
};

}  // namespace specdec::cuda

// How a thread's floating-point arithmetic rounds, and what it does with subnormal numbers.
//
// A program may set both: torch.set_flush_denormal makes zeros of subnormal numbers, and threads inherit that from
// whoever starts them. Kernels count on IEEE arithmetic: the number next to 0 is not 0, and a product below 2^-126 is
// not lost. So each call sets its threads' state and gives them their own back. It takes a few nanoseconds.
#pragma once

#include <cstdint>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace specdec::cpu {

class IeeeArithmetic {
 public:
  IeeeArithmetic() : before_(state()) {
    if ((before_ & kControl) != (kIeee & kControl)) set((before_ & ~kControl) | kIeee);
  }
  ~IeeeArithmetic() {
    if ((before_ & kControl) != (kIeee & kControl)) set(before_);
  }
  IeeeArithmetic(const IeeeArithmetic&) = delete;
  IeeeArithmetic& operator=(const IeeeArithmetic&) = delete;

 private:
#if defined(__SSE__)
  using State = uint32_t;
  static constexpr State kControl = 0xffc0, kIeee = 0x1f80;  // all but the flags; no traps, to nearest, nothing flushed
  static State state() { return _mm_getcsr(); }
  static void set(State state) { _mm_setcsr(state); }
#elif defined(__aarch64__)
  using State = uint64_t;
  static constexpr State kControl = ~State(0), kIeee = 0;
  static State state() {
    State state;
    asm volatile("mrs %0, fpcr" : "=r"(state));
    return state;
  }
  static void set(State state) { asm volatile("msr fpcr, %0" : : "r"(state)); }
#else
  using State = uint32_t;
  static constexpr State kControl = 0, kIeee = 0;
  static State state() { return 0; }
  static void set(State) {}
#endif
  const State before_;
};

}  // namespace specdec::cpu

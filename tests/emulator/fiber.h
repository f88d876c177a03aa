// A stack of its own for each CUDA thread, and the switch between it and the scheduler.
//
// The sanitizers are told about every switch: AddressSanitizer needs to know which stack is in use, and to
// ThreadSanitizer each fiber is a thread. This file's code must not be compiled with -fsanitize=thread, since it plays
// the part of the hardware; SPECDEC_EMULATOR_TSAN says that the kernels are.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#define SPECDEC_EMULATOR_UCONTEXT
#endif
#ifdef SPECDEC_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

namespace specdec::emulator {

class Fiber {
 public:
  explicit Fiber(void (*body)());  // which must yield when it is through, and may then go on with a new task
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void resume();   // by the scheduler
  void yield();    // by the running fiber: back to the scheduler
  void restart();  // forgets what the fiber was doing

  // Runs `act` as this fiber, or as the scheduler, in the eyes of ThreadSanitizer. The stack stays the same.
  template <class Act>
  void as_this_fiber(Act act) {
    void* before = take_identity(identity_);
    act();
    take_identity(before);
  }
  template <class Act>
  static void as_scheduler(Act act) {
    void* before = take_identity(scheduler_identity());
    act();
    take_identity(before);
  }

 private:
  static void entry();
  static void* take_identity(void* identity);  // returns the one before
  static void* scheduler_identity();

  void (*body_)();
  unsigned char* stack_;  // above a guard page
#ifdef SPECDEC_EMULATOR_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  void* identity_ = nullptr;    // ThreadSanitizer's
};

// What happened before this call in any thread also happened before a later `acquire` of the same object.
void release(void* object);
void acquire(void* object);

}  // namespace specdec::emulator

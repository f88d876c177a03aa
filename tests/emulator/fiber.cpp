#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#include "emulator.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef SPECDEC_EMULATOR_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* object);
void __tsan_release(void* object);
}
#endif

#ifndef SPECDEC_EMULATOR_UCONTEXT
// Saves the registers that a call must keep, changes stacks, and restores those of the other side.
extern "C" void specdec_emulator_switch(void** save_stack_pointer, void* load_stack_pointer);
asm(R"(
.text
.globl specdec_emulator_switch
.hidden specdec_emulator_switch
.type specdec_emulator_switch,@function
specdec_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size specdec_emulator_switch,.-specdec_emulator_switch
)");
#endif

namespace specdec::emulator {

namespace {

constexpr size_t kGuardBytes = 4096;
#if defined(__SANITIZE_ADDRESS__) || defined(SPECDEC_EMULATOR_TSAN)
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif

// The scheduler's side of the switch. One fiber runs at a time, in one thread of the operating system.
struct Scheduler {
#ifdef SPECDEC_EMULATOR_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer;
#endif
  void* fake_stack;
  const void* stack_bottom;
  size_t stack_bytes;
  void* identity;          // ThreadSanitizer's
  void* current_identity;  // which may be a fiber's
  void (*body)();
};
Scheduler scheduler;

void finish_switch_to_fiber([[maybe_unused]] void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, &scheduler.stack_bottom, &scheduler.stack_bytes);
#endif
}

}  // namespace

Fiber::Fiber(void (*body)()) : body_(body) {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardBytes, PROT_NONE);
  stack_ = static_cast<unsigned char*>(memory) + kGuardBytes;
#ifdef SPECDEC_EMULATOR_TSAN
  identity_ = __tsan_create_fiber(0);
#endif
  restart();
}

Fiber::~Fiber() {
  munmap(stack_ - kGuardBytes, kGuardBytes + kStackBytes);
#ifdef SPECDEC_EMULATOR_TSAN
  __tsan_destroy_fiber(identity_);
#endif
}

void Fiber::entry() {
  finish_switch_to_fiber(nullptr);
  scheduler.body();
}

void Fiber::restart() {
  SPECDEC_UNPOISON(stack_, kStackBytes);
  fake_stack_ = nullptr;
#ifdef SPECDEC_EMULATOR_UCONTEXT
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::entry, 0);
#else
  void** top = reinterpret_cast<void**>(stack_ + kStackBytes - 64);
  *--top = nullptr;                                 // where entry would return to
  *--top = reinterpret_cast<void*>(&Fiber::entry);  // the switch returns here, with the stack aligned as for a call
  for (int i = 0; i < 6; ++i) *--top = nullptr;     // registers
  stack_pointer_ = top;
#endif
}

void Fiber::resume() {
  scheduler.body = body_;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler.fake_stack, stack_, kStackBytes);
#endif
#ifdef SPECDEC_EMULATOR_TSAN
  scheduler.identity = scheduler.current_identity = __tsan_get_current_fiber();
#endif
  take_identity(identity_);
#ifdef SPECDEC_EMULATOR_UCONTEXT
  swapcontext(&scheduler.context, &context_);
#else
  specdec_emulator_switch(&scheduler.stack_pointer, stack_pointer_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
#endif
}

void Fiber::yield() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_stack_, scheduler.stack_bottom, scheduler.stack_bytes);
#endif
  take_identity(scheduler.identity);
#ifdef SPECDEC_EMULATOR_UCONTEXT
  swapcontext(&context_, &scheduler.context);
#else
  specdec_emulator_switch(&stack_pointer_, scheduler.stack_pointer);
#endif
  finish_switch_to_fiber(fake_stack_);
}

void* Fiber::scheduler_identity() { return scheduler.identity; }

void* Fiber::take_identity(void* identity) {
  void* before = scheduler.current_identity;
#ifdef SPECDEC_EMULATOR_TSAN
  if (identity != before) __tsan_switch_to_fiber(identity, 1);  // 1: the switch itself orders nothing
#endif
  scheduler.current_identity = identity;
  return before;
}

void release([[maybe_unused]] void* object) {
#ifdef SPECDEC_EMULATOR_TSAN
  __tsan_release(object);
#endif
}

void acquire([[maybe_unused]] void* object) {
#ifdef SPECDEC_EMULATOR_TSAN
  __tsan_acquire(object);
#endif
}

}  // namespace specdec::emulator

// Switching between stacks. x86-64 has its own switch; elsewhere, or with HFF_UCONTEXT, it is ucontext's, whose two
// system calls make it slower.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if defined(__x86_64__) && !defined(HFF_UCONTEXT)
extern "C" void hf_emulator_switch(void** save, void* load);
// "weak": every translation unit that includes this defines it.
asm(R"(
.text
.weak hf_emulator_switch
.type hf_emulator_switch, @function
hf_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size hf_emulator_switch, .-hf_emulator_switch
)");
#else
#include <ucontext.h>
#endif

namespace emulator {

constexpr size_t kStack = 64 << 10;

struct Context {
  std::unique_ptr<char[]> stack;
#if defined(__x86_64__) && !defined(HFF_UCONTEXT)
  void* pointer = nullptr;

  void start(void (*entry)()) {
    if (!stack) stack.reset(new char[kStack]);
    auto top = reinterpret_cast<uintptr_t>(stack.get() + kStack) & ~uintptr_t(63);
    auto* words = reinterpret_cast<void**>(top - 64);
    *--words = nullptr;  // where entry would return to, if it did
    *--words = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--words = nullptr;
    pointer = words;
  }
  void switch_to(Context& other) { hf_emulator_switch(&pointer, other.pointer); }
#else
  ucontext_t state;

  void start(void (*entry)()) {
    if (!stack) stack.reset(new char[kStack]);
    getcontext(&state);
    state.uc_stack.ss_sp = stack.get();
    state.uc_stack.ss_size = kStack;
    state.uc_link = nullptr;
    makecontext(&state, entry, 0);
  }
  void switch_to(Context& other) { swapcontext(&state, &other.state); }
#endif
};

}  // namespace emulator

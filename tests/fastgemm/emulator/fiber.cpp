// The switch between stacks: callee-saved registers go to the stack that is left, the others are dead at a call.
#include "fiber.h"

#include <string.h>

extern "C" void emulator_switch(void** leave, void* enter);
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
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
.size emulator_switch, . - emulator_switch
.section .note.GNU-stack,"",@progbits
.text
)");

namespace emulator {
namespace {

constexpr int kSavedRegisters = 6;
constexpr size_t kDirtied = 8192;        // of a stack: more than the kernels use
constexpr size_t kStagger = 5 * 64;      // bytes between the tops of successive stacks, which begin at like addresses
constexpr size_t kMaxStagger = 32 << 10;
void* main_stack_pointer;

}  // namespace

void Fiber::prepare(char* stack, int index, void (*entry)()) {
  char* const end = stack + kStackBytes - index * kStagger % kMaxStagger;
  // Variables without a value have the same one in every run.
  memset(end - kDirtied, 0x3C, kDirtied);
  void** top = reinterpret_cast<void**>(end - 64);
  *--top = nullptr;  // the return address of `entry`; at its first instruction the ABI wants rsp = 8 modulo 16
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  stack_pointer_ = top;
}

void Fiber::resume() { emulator_switch(&main_stack_pointer, stack_pointer_); }

void Fiber::suspend() { emulator_switch(&stack_pointer_, main_stack_pointer); }

}  // namespace emulator

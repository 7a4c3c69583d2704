// Fibers of x86-64 (System V ABI): a stack each, switched without the kernel.
#pragma once

#include <stddef.h>

namespace emulator {

constexpr size_t kStackBytes = 64 << 10;

// A fiber that has been given an entry runs it when it is first resumed.
class Fiber {
 public:
  // `stack` holds kStackBytes; `entry` never returns.  Fibers of different `index` use different cache lines.
  void prepare(char* stack, int index, void (*entry)());
  void resume();   // by the main stack; returns at the fiber's next suspend()
  void suspend();  // by the fiber itself

 private:
  void* stack_pointer_ = nullptr;
};

}  // namespace emulator

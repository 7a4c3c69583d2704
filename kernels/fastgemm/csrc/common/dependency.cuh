// Programmatic dependent launch in code that is also compiled for architectures without it.
//
// Kernels here let the next one be scheduled at their very start, so that several kernels of a stream can be resident
// at once, each waiting for the one before it.  Every kernel waits before it reads an earlier kernel's results or
// writes anything; a kernel that is complete has waited, so everything before it is complete too.
#pragma once

#include <stdint.h>

namespace fg {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FG_HAS_DEPENDENT_LAUNCH 1
#endif

__device__ __forceinline__ void grid_launch_dependents() {
#if defined(FG_HAS_DEPENDENT_LAUNCH)
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void grid_dependency_wait() {
#if defined(FG_HAS_DEPENDENT_LAUNCH)
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Brings the line of `address` into the L2 cache.  Nothing is read: safe where an earlier kernel may still write.
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

}  // namespace fg

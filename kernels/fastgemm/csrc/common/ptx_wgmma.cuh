// Warpgroup matrix instructions: ordering and shared-memory matrix descriptors.
#pragma once

#include "ptx_wgmma_s8.cuh"

namespace fg::ptx {

// Orders register writes (accumulators, A fragments) before the wgmma instructions that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses of an accumulator or fragment register across this point.
template <class Word>
__device__ __forceinline__ void wgmma_pin(Word& value) {
  asm volatile("" : "+r"(value)::"memory");
}

__device__ __forceinline__ void wgmma_pin(float& value) { asm volatile("" : "+f"(value)::"memory"); }

// Descriptor of a K-major operand stored as rows of 128 bytes with the 128-byte swizzle; groups of 8 rows are 1024
// bytes apart.  The next 32 bytes along K are reached by adding 2 (units of 16 bytes) to the descriptor.
__device__ __forceinline__ uint64_t swizzled_descriptor(uint32_t address) {
  return (static_cast<uint64_t>(1) << 62) | (static_cast<uint64_t>(1024 >> 4) << 32) | (static_cast<uint64_t>(1) << 16) |
         static_cast<uint64_t>((address & 0x3FFFF) >> 4);
}

}  // namespace fg::ptx

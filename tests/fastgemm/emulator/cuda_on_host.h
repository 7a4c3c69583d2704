// What nvcc knows by itself and g++ does not.  Included before the kernel sources (g++ -include); everything is declared in
// namespace fg, where the kernels find it before anything global.
#pragma once

#define __CUDA_ARCH_FEAT_SM90_ALL 1  // the kernel is empty without it

#include <cuda.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

#include "emulator.h"

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__

namespace fg {

// Set by the scheduler whenever it resumes a thread.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 gridDim;

namespace sm90 {

extern uint8_t shared_memory[];  // its address is never used: smem_address() knows where shared memory begins

}  // namespace sm90

template <class To, class From>
inline To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof to);
  return to;
}

inline void __syncthreads() { emulator::cta_sync(); }
inline void __syncwarp() { emulator::warp_sync(); }

template <class Value>
inline Value __ldg(const Value* pointer) {
  return *pointer;
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

// Built with -ffp-contract=off: each of these rounds by itself.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline float __int_as_float(int a) { return same_bits<float>(a); }
inline float __uint_as_float(uint32_t a) { return same_bits<float>(a); }
inline int __float_as_int(float a) { return same_bits<int>(a); }
inline uint32_t __float_as_uint(float a) { return same_bits<uint32_t>(a); }

// lop3.b32: bit i of the result is the bit of `table` that the i-th bits of a, b and c name.
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, int table) {
  uint32_t result = 0;
  for (int row = 0; row < 8; ++row) {
    if ((table >> row & 1) == 0) continue;
    result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  }
  return result;
}

// The runtime's templates exist for nvcc only.
template <class Kernel>
inline cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return ::cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

}  // namespace fg

// 16-bit tensor-core products and the conversions around them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "../common/ptx_barrier.cuh"
#include "../common/ptx_copy.cuh"
#include "../sm80/ptx.cuh"

namespace fg::attention {

using sm80::commit_copies;
using sm80::copy_async;
using sm80::load_matrices;
using sm80::shared_address;
using sm80::wait_copies;

__device__ __forceinline__ void copy_async_16(uint32_t target, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

// As load_matrices, each 8x8 matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

template <typename T>
struct Type;

template <>
struct Type<__half> {
  __device__ static float2 unpack(uint32_t v) { return __half22float2(*reinterpret_cast<const __half2*>(&v)); }
  __device__ static uint32_t pack(float low, float high) {
    const __half2 v = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  // c[16, 8] += a[16, 16] b[16, 8]
  __device__ static void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

template <>
struct Type<__nv_bfloat16> {
  __device__ static float2 unpack(uint32_t v) { return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&v)); }
  __device__ static uint32_t pack(float low, float high) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  __device__ static void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// Rotates the pairs (low, high), two of them, by their angles: fp32 with one rounding per operation (no contraction, so
// that every implementation computes the same bits), then rounded once.
template <typename T>
__device__ __forceinline__ void rotate(uint32_t& low, uint32_t& high, float2 cos, float2 sin) {
  const float2 x1 = Type<T>::unpack(low), x2 = Type<T>::unpack(high);
  low = Type<T>::pack(__fsub_rn(__fmul_rn(x1.x, cos.x), __fmul_rn(x2.x, sin.x)),
                      __fsub_rn(__fmul_rn(x1.y, cos.y), __fmul_rn(x2.y, sin.y)));
  high = Type<T>::pack(__fadd_rn(__fmul_rn(x2.x, cos.x), __fmul_rn(x1.x, sin.x)),
                       __fadd_rn(__fmul_rn(x2.y, cos.y), __fmul_rn(x1.y, sin.y)));
}

// 2^x, approximate to 2 ulp; 0 for -Inf.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fg::attention

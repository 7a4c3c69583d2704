// From int32 accumulators to the output type: (fp32(acc) * x_scale) * w_scale + bias, one rounding per operation.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "../fastgemm.h"

namespace fg {
namespace sm80 {

struct Epilogue {
  const float* x_scale;  // [M]
  const float* w_scale;  // [N]
  const void* bias;      // [N] of out_dtype, or nullptr
  void* out;             // [M, N]
  int64_t n;
  int out_dtype;
  int shift;        // powers of two in the accumulator that are not part of the result (4: high-nibble weights)
  bool float_sums;  // the accumulators are the bits of fp32 sums that already hold the weight's scales
};

__device__ __forceinline__ uint32_t pair(__half a, __half b) {
  return static_cast<uint32_t>(__half_as_ushort(a)) | (static_cast<uint32_t>(__half_as_ushort(b)) << 16);
}

__device__ __forceinline__ uint32_t pair(__nv_bfloat16 a, __nv_bfloat16 b) {
  return static_cast<uint32_t>(__bfloat16_as_ushort(a)) | (static_cast<uint32_t>(__bfloat16_as_ushort(b)) << 16);
}

// Finishes eight neighbouring accumulators of row `row`, columns column..column+7.
__device__ __forceinline__ void store8(const Epilogue& e, int64_t row, int64_t column, int32_t (&acc)[8]) {
  const int64_t offset = row * e.n + column;
  if (!e.float_sums) {
#pragma unroll
    for (int i = 0; i < 8; ++i) acc[i] >>= e.shift;
  }
  if (e.out_dtype == FG_I32) {
    int4* out = reinterpret_cast<int4*>(static_cast<int32_t*>(e.out) + offset);
    out[0] = make_int4(acc[0], acc[1], acc[2], acc[3]);
    out[1] = make_int4(acc[4], acc[5], acc[6], acc[7]);
    return;
  }
  const float x_scale = e.x_scale[row];
  float y[8];
#pragma unroll
  for (int i = 0; i < 8; ++i)
    y[i] = e.float_sums ? __int_as_float(acc[i]) * x_scale
                        : __fmul_rn(__fmul_rn(__int2float_rn(acc[i]), x_scale), e.w_scale[column + i]);
  if (e.out_dtype == FG_F32) {
    if (e.bias) {
      const float* bias = static_cast<const float*>(e.bias) + column;
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] = __fadd_rn(y[i], bias[i]);
    }
    float4* out = reinterpret_cast<float4*>(static_cast<float*>(e.out) + offset);
    out[0] = make_float4(y[0], y[1], y[2], y[3]);
    out[1] = make_float4(y[4], y[5], y[6], y[7]);
    return;
  }
  uint4 words;
  if (e.out_dtype == FG_F16) {
    if (e.bias) {
      const __half* bias = static_cast<const __half*>(e.bias) + column;
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] = __fadd_rn(y[i], __half2float(bias[i]));
    }
    words.x = pair(__float2half_rn(y[0]), __float2half_rn(y[1]));
    words.y = pair(__float2half_rn(y[2]), __float2half_rn(y[3]));
    words.z = pair(__float2half_rn(y[4]), __float2half_rn(y[5]));
    words.w = pair(__float2half_rn(y[6]), __float2half_rn(y[7]));
  } else {
    if (e.bias) {
      const __nv_bfloat16* bias = static_cast<const __nv_bfloat16*>(e.bias) + column;
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] = __fadd_rn(y[i], __bfloat162float(bias[i]));
    }
    words.x = pair(__float2bfloat16_rn(y[0]), __float2bfloat16_rn(y[1]));
    words.y = pair(__float2bfloat16_rn(y[2]), __float2bfloat16_rn(y[3]));
    words.z = pair(__float2bfloat16_rn(y[4]), __float2bfloat16_rn(y[5]));
    words.w = pair(__float2bfloat16_rn(y[6]), __float2bfloat16_rn(y[7]));
  }
  *reinterpret_cast<uint4*>(static_cast<uint16_t*>(e.out) + offset) = words;
}

}  // namespace sm80
}  // namespace fg

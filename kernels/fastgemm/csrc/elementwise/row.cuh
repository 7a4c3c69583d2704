// One thread block handles one row of activations, which is read from global memory once: each thread keeps its
// share of the row in registers as 16-byte vectors (kKept of them) between the reductions over the row.  Rows of
// more than 64 KB, or whose length is no multiple of a vector, are read again for every step (kKept = 0), from the
// L2 cache when they are fresh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "../fastgemm.h"

namespace fg {
namespace elementwise {

template <typename T, int V>
struct alignas(sizeof(T) * V) Vec {
  T v[V];
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <typename T, int V>
__device__ __forceinline__ Vec<T, V> load(const T* row, int64_t index) {
  return *reinterpret_cast<const Vec<T, V>*>(row + index * V);
}

template <typename T, int V>
__device__ __forceinline__ void store(T* row, int64_t index, const Vec<T, V>& value) {
  *reinterpret_cast<Vec<T, V>*>(row + index * V) = value;
}

constexpr int kMaxWarps = 32;

// Every thread gets the sum over the block, always added in the same order.
__device__ __forceinline__ float block_sum(float value, float* scratch) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  const int warps = blockDim.x / 32;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = threadIdx.x % 32 < warps ? scratch[threadIdx.x % 32] : 0.0f;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

__device__ __forceinline__ uint32_t block_max(uint32_t value, uint32_t* scratch) {
  value = __reduce_max_sync(0xffffffffu, value);
  const int warps = blockDim.x / 32;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  return __reduce_max_sync(0xffffffffu, threadIdx.x % 32 < warps ? scratch[threadIdx.x % 32] : 0u);
}

// The magnitude's bits order like the magnitudes themselves, with Inf above every number and NaN above Inf.
__device__ __forceinline__ uint32_t magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

__device__ __forceinline__ uint32_t saturate_to_int8(float x) {
  int32_t q;
  asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(q) : "f"(x));  // round half to even; NaN becomes 0
  return static_cast<uint32_t>(q) & 0xffu;
}

// rint(x / scale) with IEEE division, saturated to int8.  Multiplying with the reciprocal is off by at most three
// units of 2^-24 relative to the quotient, 2.3e-5 for |quotient| <= 128, so only results that close to a tie (and
// overflows and NaN, which fail the comparison) need the division.
__device__ __forceinline__ uint32_t quantize(float x, float scale, float reciprocal) {
  float y = x * reciprocal;
  if (!(fabsf(y - rintf(y)) < 0.49997f)) y = __fdiv_rn(x, scale);
  return saturate_to_int8(y);
}

template <typename T, int V>
__device__ __forceinline__ void store_quantized(int8_t* row, int64_t index, const Vec<T, V>& y, float scale,
                                                float reciprocal) {
  if constexpr (V == 1) {
    row[index] = static_cast<int8_t>(quantize(to_float(y.v[0]), scale, reciprocal));
  } else {
    Vec<uint32_t, V / 4> words;
#pragma unroll
    for (int w = 0; w < V / 4; ++w) {
      words.v[w] = 0;
#pragma unroll
      for (int b = 0; b < 4; ++b)
        words.v[w] |= quantize(to_float(y.v[4 * w + b]), scale, reciprocal) << (8 * b);
    }
    *reinterpret_cast<Vec<uint32_t, V / 4>*>(row + index * V) = words;
  }
}

// Quantizes the row whose vectors are get(j, index): index is the vector's place in the row, j the (compile-time)
// number of the thread's kept vector.  With kKept = 0 get is called again for each of the two steps.
template <typename T, int V, int kKept, typename Get>
__device__ __forceinline__ void quantize_row(Get get, int64_t vectors, int8_t* q_row, float* scale_out) {
  __shared__ uint32_t scratch[kMaxWarps];
  Vec<T, V> kept[kKept > 0 ? kKept : 1];
  uint32_t magnitude = 0;
  const auto scan = [&](const Vec<T, V>& y) {
#pragma unroll
    for (int e = 0; e < V; ++e) magnitude = max(magnitude, magnitude_bits(to_float(y.v[e])));
  };
  if constexpr (kKept > 0) {
#pragma unroll
    for (int j = 0; j < kKept; ++j) {
      const int64_t index = threadIdx.x + static_cast<int64_t>(j) * blockDim.x;
      if (index < vectors) {
        kept[j] = get(j, index);
        scan(kept[j]);
      }
    }
  } else {
    for (int64_t index = threadIdx.x; index < vectors; index += blockDim.x) scan(get(0, index));
  }
  const float absmax = __uint_as_float(block_max(magnitude, scratch));
  const float scale = absmax == 0.0f ? 1.0f : __fdiv_rn(absmax, 127.0f);
  const float reciprocal = __frcp_rn(scale);
  if (threadIdx.x == 0) *scale_out = scale;
  if constexpr (kKept > 0) {
#pragma unroll
    for (int j = 0; j < kKept; ++j) {
      const int64_t index = threadIdx.x + static_cast<int64_t>(j) * blockDim.x;
      if (index < vectors) store_quantized<T, V>(q_row, index, kept[j], scale, reciprocal);
    }
  } else {
    for (int64_t index = threadIdx.x; index < vectors; index += blockDim.x)
      store_quantized<T, V>(q_row, index, get(0, index), scale, reciprocal);
  }
}

// Calls launch(type tag, vector width, kept vectors, threads) with the instance for `dtype` and rows of `k` elements.
template <int N>
struct Int {
  static constexpr int value = N;
};

template <typename T, typename Launch>
int for_row_length(int64_t k, Launch launch) {
  constexpr int kWidth = 16 / sizeof(T);
  if (k % kWidth != 0) return launch(T{}, Int<1>{}, Int<0>{}, k <= 4096 ? 256 : 1024);
  const int64_t vectors = k / kWidth;
  if (vectors <= 512) return launch(T{}, Int<kWidth>{}, Int<1>{}, static_cast<int>((vectors + 31) / 32 * 32));
  if (vectors <= 1024) return launch(T{}, Int<kWidth>{}, Int<2>{}, 512);
  if (vectors <= 2048) return launch(T{}, Int<kWidth>{}, Int<4>{}, 512);
  if (vectors <= 4096) return launch(T{}, Int<kWidth>{}, Int<4>{}, 1024);
  return launch(T{}, Int<kWidth>{}, Int<0>{}, 1024);
}

template <typename Launch>
int dispatch(int dtype, int64_t k, Launch launch) {
  switch (dtype) {
    case FG_F16: return for_row_length<__half>(k, launch);
    case FG_BF16: return for_row_length<__nv_bfloat16>(k, launch);
    case FG_F32: return for_row_length<float>(k, launch);
    default: return FG_ERROR_DTYPE;
  }
}

inline int launch_status() {
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? FG_OK : FG_ERROR_CUDA + static_cast<int>(status);
}

inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// The grid's x dimension, one block a row, ends here.
constexpr int64_t kMaxRows = INT32_MAX;

}  // namespace elementwise
}  // namespace fg

// 16-byte vectors of activations in registers: rounding, sums, products, magnitudes and their int8 quantization.
//
// What a thread does to the elements of a vector is independent of each other and has no branch but one for the whole
// vector: a chain of eight conditional steps costs more time than the arithmetic, where few rows are under way.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <type_traits>

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

// Two neighbours of a 16-bit type, for which one instruction does the work of two.  Sums and products so computed are
// those of fp32 arithmetic rounded to 16 bit: fp32 has more than twice the digits.
template <typename T>
struct Pair {};
template <>
struct Pair<__half> {
  using Type = __half2;
  static __device__ __forceinline__ Type pack(float low, float high) { return __floats2half2_rn(low, high); }
};
template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  static __device__ __forceinline__ Type pack(float low, float high) { return __floats2bfloat162_rn(low, high); }
};

template <typename T, int V>
constexpr bool kPaired = sizeof(T) == 2 && V % 2 == 0;

template <typename T, int V>
__device__ __forceinline__ typename Pair<T>::Type& pair(Vec<T, V>& vector, int i) {
  return reinterpret_cast<typename Pair<T>::Type*>(vector.v)[i];
}

template <typename T, int V>
__device__ __forceinline__ const typename Pair<T>::Type& pair(const Vec<T, V>& vector, int i) {
  return reinterpret_cast<const typename Pair<T>::Type*>(vector.v)[i];
}

template <typename T, int V>
__device__ __forceinline__ Vec<T, V> rounded(const float (&x)[V]) {
  Vec<T, V> y;
  if constexpr (kPaired<T, V>) {
#pragma unroll
    for (int i = 0; i < V / 2; ++i) pair(y, i) = Pair<T>::pack(x[2 * i], x[2 * i + 1]);
  } else {
#pragma unroll
    for (int e = 0; e < V; ++e) y.v[e] = from_float<T>(x[e]);
  }
  return y;
}

// a + b, rounded to T.
template <typename T, int V>
__device__ __forceinline__ Vec<T, V> sum(const Vec<T, V>& a, const Vec<T, V>& b) {
  Vec<T, V> y;
  if constexpr (kPaired<T, V>) {
#pragma unroll
    for (int i = 0; i < V / 2; ++i) pair(y, i) = __hadd2_rn(pair(a, i), pair(b, i));
  } else {
#pragma unroll
    for (int e = 0; e < V; ++e) y.v[e] = from_float<T>(to_float(a.v[e]) + to_float(b.v[e]));
  }
  return y;
}

// a b, rounded to T.
template <typename T, int V>
__device__ __forceinline__ Vec<T, V> product(const Vec<T, V>& a, const Vec<T, V>& b) {
  Vec<T, V> y;
  if constexpr (kPaired<T, V>) {
#pragma unroll
    for (int i = 0; i < V / 2; ++i) pair(y, i) = __hmul2_rn(pair(a, i), pair(b, i));
  } else {
#pragma unroll
    for (int e = 0; e < V; ++e) y.v[e] = from_float<T>(to_float(a.v[e]) * to_float(b.v[e]));
  }
  return y;
}

// The bits of a magnitude order like the magnitudes themselves, with Inf above every number and NaN above Inf.
__device__ __forceinline__ uint32_t magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// Of the largest element; NaN if any is.
template <typename T, int V>
__device__ __forceinline__ uint32_t largest_magnitude(const Vec<T, V>& x) {
  if constexpr (kPaired<T, V>) {
    auto most = __habs2(pair(x, 0));
#pragma unroll
    for (int i = 1; i < V / 2; ++i) most = __hmax2_nan(most, __habs2(pair(x, i)));
    return max(magnitude_bits(to_float(most.x)), magnitude_bits(to_float(most.y)));
  } else {
    uint32_t most = 0;
#pragma unroll
    for (int e = 0; e < V; ++e) most = max(most, magnitude_bits(to_float(x.v[e])));
    return most;
  }
}

__device__ __forceinline__ float max_or_nan(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// What store_quantized multiplies with: NaN, which it takes for "divide", where the scale is subnormal: 1 / scale may
// overflow, and a scale rounded to so few digits makes quotients above 127, which have to be saturated.
__device__ __forceinline__ float quantization_reciprocal(float scale) {
  constexpr float kLeastNormal = 1.17549435e-38f;
  return scale >= kLeastNormal ? __frcp_rn(scale) : __uint_as_float(0x7fffffffu);
}

__device__ __forceinline__ uint32_t saturate_to_int8(float x) {
  int32_t q;
  asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(q) : "f"(x));  // round half to even; NaN becomes 0
  return static_cast<uint32_t>(q);
}

// Writes rint(x / scale) with IEEE division, saturated to int8, for the elements x of a vector, none larger than 127
// scale.  Multiplying with the reciprocal is off by at most three units of 2^-24 relative to the quotient, 2.3e-5 for
// |quotient| <= 128, so only vectors with a result that close to a tie (and NaN, which fails the comparison) need the
// division.  Adding 1.5 * 2^23 rounds to an integer and leaves its two's complement in the low bits of the sum.
template <typename T, int V>
__device__ __forceinline__ void store_quantized(int8_t* row, int64_t index, const Vec<T, V>& y, float scale,
                                                float reciprocal) {
  constexpr float kShift = 12582912.0f;
  uint32_t code[V];
  float rest[V];
#pragma unroll
  for (int e = 0; e < V; ++e) {
    const float x = to_float(y.v[e]), shifted = fmaf(x, reciprocal, kShift);
    rest[e] = fabsf(fmaf(x, reciprocal, -(shifted - kShift)));
    code[e] = __float_as_uint(shifted);
  }
#pragma unroll
  for (int step = V / 2; step > 0; step /= 2) {
#pragma unroll
    for (int e = 0; e < step; ++e) rest[e] = max_or_nan(rest[e], rest[e + step]);
  }
  if (__builtin_expect(!(rest[0] < 0.49997f), 0)) {
#pragma unroll
    for (int e = 0; e < V; ++e) code[e] = saturate_to_int8(__fdiv_rn(to_float(y.v[e]), scale));
  }
  if constexpr (V == 1) {
    row[index] = static_cast<int8_t>(code[0]);
  } else {
    Vec<uint32_t, V / 4> words;
#pragma unroll
    for (int w = 0; w < V / 4; ++w) {
      const uint32_t low = __byte_perm(code[4 * w], code[4 * w + 1], 0x0040);
      const uint32_t high = __byte_perm(code[4 * w + 2], code[4 * w + 3], 0x0040);
      words.v[w] = __byte_perm(low, high, 0x5410);
    }
    *reinterpret_cast<Vec<uint32_t, V / 4>*>(row + index * V) = words;
  }
}

}  // namespace elementwise
}  // namespace fg

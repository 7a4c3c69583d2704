// RMSNorm of x or x + residual, rounded where Transformers' LlamaRMSNorm rounds, then per-token int8 quantization.
#include "row.cuh"

namespace fg {
namespace elementwise {
namespace {

template <typename T, int V>
__device__ __forceinline__ float sum_of_squares(const Vec<T, V>& h) {
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < V; ++e) sum = fmaf(to_float(h.v[e]), to_float(h.v[e]), sum);
  return sum;
}

template <typename T, int V>
__device__ __forceinline__ Vec<T, V> normalize(const Vec<T, V>& h, const Vec<T, V>& weight, float rsqrt_mean) {
  Vec<T, V> y;
#pragma unroll
  for (int e = 0; e < V; ++e) {
    const T normal = from_float<T>(to_float(h.v[e]) * rsqrt_mean);
    y.v[e] = from_float<T>(to_float(weight.v[e]) * to_float(normal));
  }
  return y;
}

// residual_out may be the same memory as residual: every element is read and written by one thread.
template <typename T, int V, int kKept>
__global__ void __launch_bounds__(1024)
    rms_norm_quant(const T* x, const T* residual, const T* weight, float eps, T* residual_out, int8_t* q, float* scale,
                   int64_t k) {
  __shared__ float scratch[kMaxWarps];
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * k;
  const int64_t vectors = k / V;
  const auto read = [&](int64_t index) {
    Vec<T, V> h = load<T, V>(x + offset, index);
    if (residual) {
      const Vec<T, V> r = load<T, V>(residual + offset, index);
#pragma unroll
      for (int e = 0; e < V; ++e) h.v[e] = from_float<T>(to_float(r.v[e]) + to_float(h.v[e]));
      if (residual_out) store<T, V>(residual_out + offset, index, h);
    } else if (residual_out) {
      store<T, V>(residual_out + offset, index, h);
    }
    return h;
  };

  // Short rows also fetch the weight before the reduction, whose latency then hides behind it.
  constexpr bool kEarlyWeight = kKept > 0 && kKept <= 2;
  Vec<T, V> kept[kKept > 0 ? kKept : 1];
  Vec<T, V> kept_weight[kEarlyWeight ? kKept : 1];
  float sum = 0.0f;
  if constexpr (kKept > 0) {
#pragma unroll
    for (int j = 0; j < kKept; ++j) {
      const int64_t index = threadIdx.x + static_cast<int64_t>(j) * blockDim.x;
      if (index < vectors) {
        kept[j] = read(index);
        if constexpr (kEarlyWeight) kept_weight[j] = load<T, V>(weight, index);
        sum += sum_of_squares<T, V>(kept[j]);
      }
    }
  } else {
    for (int64_t index = threadIdx.x; index < vectors; index += blockDim.x) sum += sum_of_squares<T, V>(read(index));
  }
  const float mean = __fdiv_rn(block_sum(sum, scratch), static_cast<float>(k));
  const float rsqrt_mean = rsqrtf(mean + eps);

  // The sums a row read again is made of are in residual_out if anywhere: residual may have been overwritten.
  const auto get = [&](int j, int64_t index) {
    if constexpr (kEarlyWeight) {
      return normalize<T, V>(kept[j], kept_weight[j], rsqrt_mean);
    } else if constexpr (kKept > 0) {
      return normalize<T, V>(kept[j], load<T, V>(weight, index), rsqrt_mean);
    } else {
      const Vec<T, V> h = residual_out ? load<T, V>(residual_out + offset, index) : read(index);
      return normalize<T, V>(h, load<T, V>(weight, index), rsqrt_mean);
    }
  };
  quantize_row<T, V, kKept>(get, vectors, q + offset, scale + blockIdx.x);
}

}  // namespace
}  // namespace elementwise
}  // namespace fg

extern "C" int fg_rms_norm_quant(const void* x, const void* residual_or_null, const void* weight, float eps,
                                 int in_dtype, void* residual_out_or_null, int8_t* q, float* scale, int64_t m,
                                 int64_t k, void* stream) {
  using namespace fg::elementwise;
  if (m < 0 || m > kMaxRows || k <= 0) return FG_ERROR_SIZE;
  if (m == 0) return FG_OK;
  if (!x || !weight || !q || !scale) return FG_ERROR_NULL_POINTER;
  if (!aligned16(x) || !aligned16(residual_or_null) || !aligned16(weight) || !aligned16(residual_out_or_null) ||
      !aligned16(q))
    return FG_ERROR_ALIGNMENT;
  return dispatch(in_dtype, k, [&](auto type, auto width, auto kept, int threads) {
    using T = decltype(type);
    rms_norm_quant<T, decltype(width)::value, decltype(kept)::value>
        <<<static_cast<unsigned>(m), threads, 0, static_cast<cudaStream_t>(stream)>>>(
            static_cast<const T*>(x), static_cast<const T*>(residual_or_null), static_cast<const T*>(weight), eps,
            static_cast<T*>(residual_out_or_null), q, scale, k);
    return launch_status();
  });
}

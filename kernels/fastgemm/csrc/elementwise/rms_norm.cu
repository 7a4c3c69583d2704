// RMSNorm of x or x + residual, rounded where Transformers' LlamaRMSNorm rounds, alone or followed by per-token int8
// quantization.
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
  float normal[V];
#pragma unroll
  for (int e = 0; e < V; ++e) normal[e] = to_float(h.v[e]) * rsqrt_mean;
  return product(rounded<T, V>(normal), weight);
}

// residual_out may be the same memory as residual: every element is read and written by one thread.  columns: k.
// Out: int8_t (quantized, with scale) or T.
template <typename T, int V, int kKept, typename Out>
__global__ void __launch_bounds__(max_threads(kKept), kKept == 2 ? 2 : min_blocks<T>(kKept))
    rms_norm(const T* x, const T* residual, const T* weight, float eps, T* residual_out, Out* y, float* scale,
             int64_t k, float columns) {
  __shared__ __align__(16) float scratch[kMaxWarps];
  grid_launch_dependents();
  if constexpr (kKept > 0) {
    // The activations are fresh in L2; the weight comes from device memory while the preceding kernel finishes.
#pragma unroll
    for (int j = 0; j < kKept; ++j) {
      const int index = threadIdx.x + j * blockDim.x;
      if (index < k / V) prefetch_l2(weight + index * V);
    }
  }
  grid_dependency_wait();
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * k;
  const int vectors = static_cast<int>(k / V);
  T* const row = reinterpret_cast<T*>(shared_row);
  struct Raw {
    Vec<T, V> h, other;  // other: the residual in the first pass, the weight in the second
  };
  const auto fetch_sum = [&](int index) {
    Raw raw;
    raw.h = load<T, V>(x + offset, index);
    if (residual) raw.other = load<T, V>(residual + offset, index);
    return raw;
  };
  const auto finish_sum = [&](Raw raw, int index) {
    if (residual) raw.h = elementwise::sum(raw.other, raw.h);
    if (residual_out) store<T, V>(residual_out + offset, index, raw.h);
    return raw.h;
  };

  // Rows in registers fetch everything, the weight too, before the first use.
  constexpr bool kEarlyWeight = kKept > 0;
  Vec<T, V> kept[kKept > 0 ? kKept : 1];
  Vec<T, V> kept_weight[kEarlyWeight ? kKept : 1];
  float sum = 0.0f;
  if constexpr (kKept > 0) {
    Raw raw[kKept];
#pragma unroll
    for (int j = 0; j < kKept; ++j) {
      const int index = threadIdx.x + j * blockDim.x;
      if (index < vectors) {
        raw[j] = fetch_sum(index);
        kept_weight[j] = load<T, V>(weight, index);
      }
    }
#pragma unroll
    for (int j = 0; j < kKept; ++j) {
      const int index = threadIdx.x + j * blockDim.x;
      if (index < vectors) {
        kept[j] = finish_sum(raw[j], index);
        sum += sum_of_squares<T, V>(kept[j]);
      }
    }
  } else {
    for_batches<kKept>(
        vectors, [&](int, int index) { return fetch_sum(index); },
        [&](int, int index, const Raw& raw) {
          const Vec<T, V> h = finish_sum(raw, index);
          sum += sum_of_squares<T, V>(h);
          if constexpr (kKept == kInShared) store<T, V>(row, index, h);
        });
  }
  const float mean = __fdiv_rn(block_sum(sum, scratch), columns);
  const float rsqrt_mean = rsqrtf(mean + eps);

  const auto fetch = [&](int j, int index) {
    Raw raw;
    if constexpr (kKept > 0) {
      raw.h = kept[j];
    } else if constexpr (kKept == kInShared) {
      raw.h = load<T, V>(row, index);
    } else {
      // A row that is read again is in residual_out if anywhere: residual may have been overwritten.
      raw.h = residual_out ? load<T, V>(residual_out + offset, index) : finish_sum(fetch_sum(index), index);
    }
    if constexpr (kEarlyWeight)
      raw.other = kept_weight[j];
    else
      raw.other = load<T, V>(weight, index);
    return raw;
  };
  write_row<T, V, kKept>(fetch, [&](const Raw& raw) { return normalize<T, V>(raw.h, raw.other, rsqrt_mean); }, vectors,
                         y + offset, scale ? scale + blockIdx.x : nullptr);
}

// Out: int8_t, or void for the dtype of x.
template <typename Out>
int run(const void* x, const void* residual, const void* weight, float eps, int dtype, void* residual_out, Out* y,
        float* scale, int64_t m, int64_t k, void* stream) {
  constexpr bool kQuantize = std::is_same<Out, int8_t>::value;
  if (m < 0 || m > kMaxRows || k <= 0 || k > kMaxColumns) return FG_ERROR_SIZE;
  if (m == 0) return FG_OK;
  if (!x || !weight || !y || (kQuantize && !scale)) return FG_ERROR_NULL_POINTER;
  if (!aligned16(x) || !aligned16(residual) || !aligned16(weight) || !aligned16(residual_out) || !aligned16(y))
    return FG_ERROR_ALIGNMENT;
  return dispatch(dtype, m, k, [&](auto instance) {
    using I = decltype(instance);
    using T = typename I::T;
    using Element = typename std::conditional<kQuantize, int8_t, T>::type;
    return launch_rows(rms_norm<T, I::V, I::kKept, Element>, m, instance.threads, instance.shared_bytes, stream,
                       static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<const T*>(weight), eps,
                       static_cast<T*>(residual_out), static_cast<Element*>(y), scale, k, static_cast<float>(k));
  });
}

}  // namespace
}  // namespace elementwise
}  // namespace fg

extern "C" int fg_rms_norm_quant(const void* x, const void* residual_or_null, const void* weight, float eps,
                                 int in_dtype, void* residual_out_or_null, int8_t* q, float* scale, int64_t m,
                                 int64_t k, void* stream) {
  return fg::elementwise::run(x, residual_or_null, weight, eps, in_dtype, residual_out_or_null, q, scale, m, k, stream);
}

extern "C" int fg_rms_norm(const void* x, const void* residual_or_null, const void* weight, float eps, int dtype,
                           void* residual_out_or_null, void* y, int64_t m, int64_t k, void* stream) {
  return fg::elementwise::run(x, residual_or_null, weight, eps, dtype, residual_out_or_null, y, nullptr, m, k, stream);
}

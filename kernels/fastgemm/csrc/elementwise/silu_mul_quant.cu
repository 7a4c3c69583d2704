// silu(gate) * up, rounded where Transformers' LlamaMLP rounds, then per-token int8 quantization.
#include "row.cuh"

namespace fg {
namespace elementwise {
namespace {

template <typename T, int V>
struct Pair {
  Vec<T, V> gate, up;
};

template <typename T, int V>
__device__ __forceinline__ Vec<T, V> silu_mul(const Vec<T, V>& gate, const Vec<T, V>& up) {
  Vec<T, V> y;
#pragma unroll
  for (int e = 0; e < V; ++e) {
    const float g = to_float(gate.v[e]);
    const T activated = from_float<T>(__fdiv_rn(g, 1.0f + expf(-g)));
    y.v[e] = from_float<T>(to_float(activated) * to_float(up.v[e]));
  }
  return y;
}

template <typename T, int V, int kKept>
__global__ void __launch_bounds__(max_threads(kKept), min_blocks<T>(kKept))
    silu_mul_quant(const T* gate_up, int8_t* q, float* scale, int64_t i) {
  const int64_t row = blockIdx.x;
  const T* gate = gate_up + row * 2 * i;
  const T* up = gate + i;
  quantize_row<T, V, kKept>(
      [&](int, int index) {
        return Pair<T, V>{load<T, V>(gate, index), load<T, V>(up, index)};
      },
      [](const Pair<T, V>& pair) { return silu_mul<T, V>(pair.gate, pair.up); }, static_cast<int>(i / V), q + row * i,
      scale + row);
}

}  // namespace
}  // namespace elementwise
}  // namespace fg

extern "C" int fg_silu_mul_quant(const void* gate_up, int in_dtype, int8_t* q, float* scale, int64_t m, int64_t i,
                                 void* stream) {
  using namespace fg::elementwise;
  if (m < 0 || m > kMaxRows || i <= 0 || i > kMaxColumns) return FG_ERROR_SIZE;
  if (m == 0) return FG_OK;
  if (!gate_up || !q || !scale) return FG_ERROR_NULL_POINTER;
  if (!aligned16(gate_up) || !aligned16(q)) return FG_ERROR_ALIGNMENT;
  return dispatch(in_dtype, m, i, [&](auto instance) {
    using I = decltype(instance);
    using T = typename I::T;
    return launch_rows(silu_mul_quant<T, I::V, I::kKept>, m, instance.threads, instance.shared_bytes, stream,
                       static_cast<const T*>(gate_up), q, scale, i);
  });
}

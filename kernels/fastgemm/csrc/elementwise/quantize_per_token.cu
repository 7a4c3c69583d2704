// Symmetric dynamic int8 quantization of each row: scale = absmax / 127, q = rint(x / scale).
#include "row.cuh"

namespace fg {
namespace elementwise {
namespace {

template <typename T, int V, int kKept>
__global__ void __launch_bounds__(max_threads(kKept), min_blocks<T>(kKept))
    quantize_per_token(const T* x, int8_t* q, float* scale, int64_t k) {
  grid_launch_dependents();
  grid_dependency_wait();
  const int64_t row = blockIdx.x;
  const T* x_row = x + row * k;
  quantize_row<T, V, kKept>([&](int, int index) { return load<T, V>(x_row, index); },
                            [](const Vec<T, V>& y) { return y; }, static_cast<int>(k / V), q + row * k, scale + row);
}

}  // namespace
}  // namespace elementwise
}  // namespace fg

extern "C" int fg_quantize_per_token(const void* x, int in_dtype, int8_t* q, float* scale, int64_t m, int64_t k,
                                     void* stream) {
  using namespace fg::elementwise;
  if (m < 0 || m > kMaxRows || k <= 0 || k > kMaxColumns) return FG_ERROR_SIZE;
  if (m == 0) return FG_OK;
  if (!x || !q || !scale) return FG_ERROR_NULL_POINTER;
  if (!aligned16(x) || !aligned16(q)) return FG_ERROR_ALIGNMENT;
  return dispatch(in_dtype, m, k, [&](auto instance) {
    using I = decltype(instance);
    using T = typename I::T;
    return launch_rows(quantize_per_token<T, I::V, I::kKept>, m, instance.threads, instance.shared_bytes, stream,
                       static_cast<const T*>(x), q, scale, k);
  });
}

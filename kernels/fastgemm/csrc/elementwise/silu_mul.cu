// silu(gate) * up, rounded where Transformers' LlamaMLP rounds, alone or followed by per-token int8 quantization.
#include "row.cuh"

namespace fg {
namespace elementwise {
namespace {

template <typename T, int V>
struct GateUp {
  Vec<T, V> gate, up;
};

// x / d with IEEE rounding for d from 1 to 2^120 and finite x: what __fdiv_rn does where it does not have to look at
// exponents first (which costs a branch an element), but that -0 becomes 0.
__device__ __forceinline__ float divide_by_normal(float x, float d) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(d));
  reciprocal = fmaf(reciprocal, fmaf(-d, reciprocal, 1.0f), reciprocal);
  const float quotient = x * reciprocal;
  return fmaf(reciprocal, fmaf(-d, quotient, x), quotient);
}

// kFewRegisters: the rare division computes its denominators again, because keeping them would spill.
template <typename T, int V, bool kFewRegisters = false>
__device__ __forceinline__ Vec<T, V> silu_mul(const GateUp<T, V>& in) {
  constexpr float kMost = 80.0f;  // exp(80) < 2^120
  float denominator[V], activated[V];
#pragma unroll
  for (int e = 0; e < V; ++e) {
    const float gate = to_float(in.gate.v[e]);
    denominator[e] = 1.0f + expf(-gate);
    activated[e] = divide_by_normal(gate, denominator[e]);
  }
  const bool usual = sizeof(T) == 2 && __uint_as_float(largest_magnitude(in.gate)) < kMost;
  if (__builtin_expect(!usual, 0)) {
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const float gate = to_float(in.gate.v[e]);
      activated[e] = __fdiv_rn(gate, kFewRegisters ? 1.0f + expf(-gate) : denominator[e]);
    }
  }
  return product(rounded<T, V>(activated), in.up);
}

template <typename T, int V>
__device__ __forceinline__ GateUp<T, V> load_gate_up(const T* gate, const T* up, int index) {
  return GateUp<T, V>{load<T, V>(gate, index), load<T, V>(up, index)};
}

// With rows in shared memory: three blocks of 512 threads a multiprocessor, which take as many registers as two of 768.
template <typename T, int V, int kKept>
__global__ void __launch_bounds__(max_threads(kKept), kKept == kInShared ? 2 : min_blocks<T>(kKept))
    silu_mul_quant(const T* gate_up, int8_t* q, float* scale, int64_t i) {
  grid_launch_dependents();
  grid_dependency_wait();
  const int64_t row = blockIdx.x;
  const T* gate = gate_up + row * 2 * i;
  const T* up = gate + i;
  quantize_row<T, V, kKept>([&](int, int index) { return load_gate_up<T, V>(gate, up, index); },
                            [](const GateUp<T, V>& in) { return silu_mul<T, V, kKept == kInShared>(in); },
                            static_cast<int>(i / V), q + row * i, scale + row);
}

// Few rows: one row is the work of a cluster, because a single multiprocessor takes microseconds to compute it.
template <typename T, int V, int kKept>
__global__ void __launch_bounds__(kMaxClusterThreads, 1)
    silu_mul_quant_cluster(const T* gate_up, int8_t* q, float* scale, int64_t i) {
  grid_launch_dependents();
  cluster_max_prepare();
  const int64_t row = blockIdx.y;
  const int vectors = static_cast<int>(i / V);
  const int share = (vectors + kClusterBlocks - 1) / kClusterBlocks;
  const int begin = min(vectors, static_cast<int>(blockIdx.x) * share);
  grid_dependency_wait();
  const T* gate = gate_up + row * 2 * i + begin * V;
  const T* up = gate + i;
  quantize_row<T, V, kKept, true>([&](int, int index) { return load_gate_up<T, V>(gate, up, index); },
                                  [](const GateUp<T, V>& in) { return silu_mul<T, V>(in); },
                                  min(share, vectors - begin), q + row * i + begin * V, scale + row);
}

constexpr int kSiluThreads = 256;

// One vector a thread; `blocks` of them make a row.
template <typename T, int V>
__global__ void __launch_bounds__(kSiluThreads) silu_mul_rows(const T* gate_up, T* y, int64_t i, unsigned blocks) {
  grid_launch_dependents();
  grid_dependency_wait();
  const int64_t row = blockIdx.x / blocks;
  const int64_t index = static_cast<int64_t>(blockIdx.x % blocks) * kSiluThreads + threadIdx.x;
  if (index >= i / V) return;
  const T* gate = gate_up + row * 2 * i;
  store<T, V>(y + row * i, index, silu_mul<T, V>(load_gate_up<T, V>(gate, gate + i, static_cast<int>(index))));
}

// With more rows than this every multiprocessor has a row of its own.
constexpr int64_t kMaxClusterRows = 32;
constexpr int kMinClusterVectors = 64 * kClusterBlocks;
constexpr int kMaxClusterVectors = 1024 * kClusterBlocks;

template <typename T>
int launch_quant_cluster(const void* gate_up, int8_t* q, float* scale, int64_t m, int64_t i, void* stream) {
  constexpr int V = 16 / sizeof(T);
  const int share = static_cast<int>((i / V + kClusterBlocks - 1) / kClusterBlocks);
  const bool one = share <= 512;
  const unsigned threads = (one ? share + 31 : (share + 1) / 2 + 31) / 32 * 32;
  const LaunchShape shape{dim3(kClusterBlocks, static_cast<unsigned>(m)), threads, 0, kClusterBlocks};
  const auto kernel = one ? silu_mul_quant_cluster<T, V, 1> : silu_mul_quant_cluster<T, V, 2>;
  return launch_kernel(kernel, shape, stream, static_cast<const T*>(gate_up), q, scale, i);
}

template <typename T, int V>
int launch_plain(const void* gate_up, void* y, int64_t m, int64_t i, void* stream) {
  const int64_t blocks = (i / V + kSiluThreads - 1) / kSiluThreads;
  if (m * blocks > INT32_MAX) return FG_ERROR_SIZE;
  const LaunchShape shape{dim3(static_cast<unsigned>(m * blocks)), kSiluThreads};
  return launch_kernel(silu_mul_rows<T, V>, shape, stream, static_cast<const T*>(gate_up), static_cast<T*>(y), i,
                       static_cast<unsigned>(blocks));
}

template <typename T>
int plain(const void* gate_up, void* y, int64_t m, int64_t i, void* stream) {
  constexpr int V = 16 / sizeof(T);
  return i % V == 0 ? launch_plain<T, V>(gate_up, y, m, i, stream) : launch_plain<T, 1>(gate_up, y, m, i, stream);
}

int check(const void* gate_up, const void* out, int64_t m, int64_t i) {
  if (m < 0 || m > kMaxRows || i <= 0 || i > kMaxColumns) return FG_ERROR_SIZE;
  if (m == 0) return FG_OK;
  if (!gate_up || !out) return FG_ERROR_NULL_POINTER;
  return aligned16(gate_up) && aligned16(out) ? FG_OK : FG_ERROR_ALIGNMENT;
}

}  // namespace
}  // namespace elementwise
}  // namespace fg

extern "C" int fg_silu_mul_quant(const void* gate_up, int in_dtype, int8_t* q, float* scale, int64_t m, int64_t i,
                                 void* stream) {
  using namespace fg::elementwise;
  const int code = check(gate_up, q, m, i);
  if (code != FG_OK || m == 0) return code;
  if (!scale) return FG_ERROR_NULL_POINTER;
  return dispatch(in_dtype, m, i, [&](auto instance) {
    using I = decltype(instance);
    using T = typename I::T;
    if constexpr (I::V > 1) {
      const int64_t vectors = i / I::V;
      if (m <= kMaxClusterRows && vectors >= kMinClusterVectors && vectors <= kMaxClusterVectors &&
          fg::has_dependent_launch())
        return launch_quant_cluster<T>(gate_up, q, scale, m, i, stream);
    }
    return launch_rows(silu_mul_quant<T, I::V, I::kKept>, m, instance.threads, instance.shared_bytes, stream,
                       static_cast<const T*>(gate_up), q, scale, i);
  });
}

extern "C" int fg_silu_mul(const void* gate_up, int dtype, void* y, int64_t m, int64_t i, void* stream) {
  using namespace fg::elementwise;
  const int code = check(gate_up, y, m, i);
  if (code != FG_OK || m == 0) return code;
  switch (dtype) {
    case FG_F16: return plain<__half>(gate_up, y, m, i, stream);
    case FG_BF16: return plain<__nv_bfloat16>(gate_up, y, m, i, stream);
    case FG_F32: return plain<float>(gate_up, y, m, i, stream);
    default: return FG_ERROR_DTYPE;
  }
}

// One thread block, or with few rows a cluster of them (sm_90), handles one row of activations, which is read from
// global memory once.  Between the reductions over the row each thread keeps its share of it, as 16-byte vectors: rows
// of up to 16 KB in registers (kKept vectors a thread), rows of up to 64 KB in shared memory (kKept = kInShared),
// because so many registers would leave room for one or two blocks a multiprocessor only.  Longer rows, and rows whose
// length is no multiple of a vector, are read again for every step (kKept = kReread), from the L2 cache when they are
// fresh.
#pragma once

#include "../common/dependency.cuh"
#include "../common/launch.h"
#include "../fastgemm.h"
#include "cluster_max.cuh"
#include "vector.cuh"

namespace fg {
namespace elementwise {

constexpr int kMaxWarps = 32;

constexpr int kReread = 0;
constexpr int kInShared = -1;

// Threads of a block and blocks of a multiprocessor, which decide how many registers a thread may have: without the
// second the compiler takes so many that too few rows are under way.
__host__ __device__ constexpr int max_threads(int kept) { return kept > 0 ? 512 : kept == kInShared ? 768 : 1024; }

template <typename T>
__host__ __device__ constexpr int min_blocks(int kept) {
  if (kept == 1) return 3;
  // bfloat16 takes the compiler more registers to unpack, which a third block would not leave it.
  return kept == 2 ? (std::is_same<T, __nv_bfloat16>::value ? 2 : 3) : 1;
}

constexpr int kLoads = 2;  // vectors a thread loads before it computes with them; more only cost registers

extern __shared__ uint4 shared_row[];  // the row's vectors, with kInShared; a thread only touches its own

// Every thread gets the sum over the block, always added in the same order.
__device__ __forceinline__ float block_sum(float value, float* scratch) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  const int warps = blockDim.x / 32;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  // Each thread adds up the warps' sums: sooner done than five more exchanges.
  float4 sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
  for (int first = 0; first < kMaxWarps; first += 4) {
    if (first >= warps) break;
    const float4 part = *reinterpret_cast<const float4*>(scratch + first);
    sums.x += part.x;
    sums.y += first + 1 < warps ? part.y : 0.0f;
    sums.z += first + 2 < warps ? part.z : 0.0f;
    sums.w += first + 3 < warps ? part.w : 0.0f;
  }
  return (sums.x + sums.y) + (sums.z + sums.w);
}

__device__ __forceinline__ uint32_t block_max(uint32_t value, uint32_t* scratch) {
  value = __reduce_max_sync(0xffffffffu, value);
  const int warps = blockDim.x / 32;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  return __reduce_max_sync(0xffffffffu, threadIdx.x % 32 < warps ? scratch[threadIdx.x % 32] : 0u);
}

// Runs raw = fetch(j, index), then finish(j, index, raw), for every vector of this thread, kLoads at a time, so that
// the loads of a batch are under way together.
template <int kKept, typename Fetch, typename Finish>
__device__ __forceinline__ void for_batches(int vectors, Fetch fetch, Finish finish) {
  constexpr int kBatch = kKept == 1 || kKept == kReread ? 1 : kLoads;
  const auto batch = [&](int first_j, int first_index) {
    decltype(fetch(0, 0)) raw[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int index = first_index + j * blockDim.x;
      if (index < vectors) raw[j] = fetch(first_j + j, index);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int index = first_index + j * blockDim.x;
      if (index < vectors) finish(first_j + j, index, raw[j]);
    }
  };
  if constexpr (kKept > 0) {
#pragma unroll
    for (int j = 0; j < kKept; j += kBatch) batch(j, threadIdx.x + j * blockDim.x);
  } else {
    for (int index = threadIdx.x; index < vectors; index += kBatch * blockDim.x) batch(0, index);
  }
}

// Quantizes the row whose vectors are finish(fetch(j, index)): index is the vector's place in the row, j the number of
// the thread's kept vector (a compile-time constant after unrolling).  With kReread both are called again for each of
// the two steps.  With kCluster the row is shared by the blocks of a cluster, the grid's x dimension, and each is given
// its own vectors of it; they have called cluster_max_prepare().
template <typename T, int V, int kKept, bool kCluster = false, typename Fetch, typename Finish>
__device__ __forceinline__ void quantize_row(Fetch fetch, Finish finish, int vectors, int8_t* q_row,
                                             float* scale_out) {
  T* const row = reinterpret_cast<T*>(shared_row);
  Vec<T, V> kept[kKept > 0 ? kKept : 1];
  uint32_t magnitude = 0;
  for_batches<kKept>(
      vectors, [&](int j, int index) { return fetch(j, index); },
      [&](int j, int index, const auto& raw) {
        const Vec<T, V> y = finish(raw);
        magnitude = max(magnitude, largest_magnitude(y));
        if constexpr (kKept > 0) kept[j] = y;
        if constexpr (kKept == kInShared) store<T, V>(row, index, y);
      });
  if constexpr (kCluster) {
    magnitude = cluster_max(magnitude);
  } else {
    __shared__ uint32_t scratch[kMaxWarps];
    magnitude = block_max(magnitude, scratch);
  }
  const float absmax = __uint_as_float(magnitude);
  const float scale = absmax == 0.0f ? 1.0f : __fdiv_rn(absmax, 127.0f);
  const float reciprocal = quantization_reciprocal(scale);
  if (threadIdx.x == 0 && (!kCluster || blockIdx.x == 0)) *scale_out = scale;
  if constexpr (kKept > 0) {
#pragma unroll
    for (int j = 0; j < kKept; ++j) {
      const int index = threadIdx.x + j * blockDim.x;
      if (index < vectors) store_quantized<T, V>(q_row, index, kept[j], scale, reciprocal);
    }
  } else {
    for (int index = threadIdx.x; index < vectors; index += blockDim.x) {
      if constexpr (kKept == kInShared)
        store_quantized<T, V>(q_row, index, load<T, V>(row, index), scale, reciprocal);
      else
        store_quantized<T, V>(q_row, index, finish(fetch(0, index)), scale, reciprocal);
    }
  }
}

// Writes the row whose vectors are finish(fetch(j, index)): quantized with its scale, or (Out = T) as it is.
template <typename T, int V, int kKept, typename Out, typename Fetch, typename Finish>
__device__ __forceinline__ void write_row(Fetch fetch, Finish finish, int vectors, Out* row, float* scale_out) {
  if constexpr (std::is_same<Out, int8_t>::value) {
    quantize_row<T, V, kKept>(fetch, finish, vectors, row, scale_out);
  } else {
    for_batches<kKept>(
        vectors, [&](int j, int index) { return fetch(j, index); },
        [&](int, int index, const auto& raw) { store<T, V>(row, index, finish(raw)); });
  }
}

// The type, vector width and kept vectors of a kernel instance as one argument, and how to launch it.
template <typename T_, int V_, int kKept_>
struct Instance {
  using T = T_;
  static constexpr int V = V_, kKept = kKept_;
  int threads;
  int64_t shared_bytes;
};

// So few rows that every multiprocessor has one or two: they finish sooner with more threads.
constexpr int64_t kFewRows = 256;

// Calls launch with the instance for `m` rows of `k` elements.
template <typename T, typename Launch>
int for_row_length(int64_t m, int64_t k, Launch launch) {
  constexpr int V = 16 / sizeof(T);
  if (k % V != 0) return launch(Instance<T, 1, kReread>{k <= 4096 ? 256 : 1024, 0});
  const int64_t vectors = k / V;
  const auto threads = [vectors](int kept) { return static_cast<int>((vectors + 32 * kept - 1) / (32 * kept) * 32); };
  if (vectors <= 512) return launch(Instance<T, V, 1>{threads(1), 0});
  if (vectors <= 1024) return launch(Instance<T, V, 2>{threads(2), 0});
  if (vectors <= 4096) return launch(Instance<T, V, kInShared>{m <= kFewRows ? 768 : 512, vectors * 16});
  return launch(Instance<T, V, kReread>{1024, 0});
}

template <typename Launch>
int dispatch(int dtype, int64_t m, int64_t k, Launch launch) {
  switch (dtype) {
    case FG_F16: return for_row_length<__half>(m, k, launch);
    case FG_BF16: return for_row_length<__nv_bfloat16>(m, k, launch);
    case FG_F32: return for_row_length<float>(m, k, launch);
    default: return FG_ERROR_DTYPE;
  }
}

// Launches one block per row.
template <typename... Parameters, typename... Arguments>
int launch_rows(void (*kernel)(Parameters...), int64_t rows, int threads, int64_t shared_bytes, void* stream,
                Arguments... arguments) {
  const LaunchShape shape{dim3(static_cast<unsigned>(rows)), static_cast<unsigned>(threads),
                          static_cast<size_t>(shared_bytes)};
  return launch_kernel(kernel, shape, stream, arguments...);
}

inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// The grid's x dimension, one block a row, ends at the first; indices inside a row are 32-bit.
constexpr int64_t kMaxRows = INT32_MAX;
constexpr int64_t kMaxColumns = 1 << 24;

}  // namespace elementwise
}  // namespace fg

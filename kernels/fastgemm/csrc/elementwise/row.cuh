// One thread block, or with few rows a cluster of them (sm_90), handles one row of activations, which is read from
// global memory once.  Between the reductions over
// the row each thread keeps its share of it, as 16-byte vectors: rows of up to 16 KB in registers (kKept vectors a
// thread), rows of up to 64 KB in shared memory (kKept = kInShared), because so many registers would leave room for
// one or two blocks a multiprocessor only.  Longer rows, and rows whose length is no multiple of a vector, are read
// again for every step (kKept = kReread), from the L2 cache when they are fresh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <type_traits>

#include "../common/dependency.cuh"
#include "../common/launch.h"
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

// Threads of a block and blocks of a multiprocessor, which decide how many registers a thread may have: without the
// second the compiler takes so many that too few rows are under way.
__host__ __device__ constexpr int max_threads(int kept) { return kept > 0 ? 512 : 1024; }

template <typename T>
__host__ __device__ constexpr int min_blocks(int kept) {
  if (kept == 1) return 3;
  // bfloat16 takes the compiler more registers to unpack, which a third block would not leave it.
  return kept == 2 ? (std::is_same<T, __nv_bfloat16>::value ? 2 : 3) : 1;
}

constexpr int kReread = 0;
constexpr int kInShared = -1;
constexpr int kLoads = 2;  // vectors a thread loads before it computes with them; more only cost registers

extern __shared__ uint4 shared_row[];  // the row's vectors, with kInShared; a thread only touches its own

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

// Blocks of a cluster along x that share a row.
constexpr int kClusterBlocks = 8;

// The largest of the blocks' values; the blocks must have called cluster_arrive_relaxed() before: a block that has not
// started has no shared memory to write to.
__device__ __forceinline__ uint32_t cluster_max(uint32_t value) {
  __shared__ uint32_t peers[kClusterBlocks];
  cluster_wait();
  if (threadIdx.x < gridDim.x) store_remote(&peers[blockIdx.x], threadIdx.x, value);
  cluster_arrive();
  cluster_wait();
  value = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) value = max(value, peers[i]);
  return value;
}

// The magnitude's bits order like the magnitudes themselves, with Inf above every number and NaN above Inf.
__device__ __forceinline__ uint32_t magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

__device__ __forceinline__ uint32_t saturate_to_int8(float x) {
  int32_t q;
  asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(q) : "f"(x));  // round half to even; NaN becomes 0
  return static_cast<uint32_t>(q) & 0xffu;
}

// Writes rint(x / scale) with IEEE division, saturated to int8, for the elements x of a vector.  Multiplying with the
// reciprocal is off by at most three units of 2^-24 relative to the quotient, 2.3e-5 for |quotient| <= 128, so only
// results that close to a tie (and overflows and NaN, which fail the comparison) need the division; then the whole
// vector is divided, so that there is one branch.
template <typename T, int V>
__device__ __forceinline__ void store_quantized(int8_t* row, int64_t index, const Vec<T, V>& y, float scale,
                                                float reciprocal) {
  float quotient[V];
  bool certain = true;
#pragma unroll
  for (int e = 0; e < V; ++e) {
    quotient[e] = to_float(y.v[e]) * reciprocal;
    certain = certain && fabsf(quotient[e] - rintf(quotient[e])) < 0.49997f;
  }
  if (!certain) {
#pragma unroll
    for (int e = 0; e < V; ++e) quotient[e] = __fdiv_rn(to_float(y.v[e]), scale);
  }
  if constexpr (V == 1) {
    row[index] = static_cast<int8_t>(saturate_to_int8(quotient[0]));
  } else {
    Vec<uint32_t, V / 4> words;
#pragma unroll
    for (int w = 0; w < V / 4; ++w) {
      words.v[w] = 0;
#pragma unroll
      for (int b = 0; b < 4; ++b) words.v[w] |= saturate_to_int8(quotient[4 * w + b]) << (8 * b);
    }
    *reinterpret_cast<Vec<uint32_t, V / 4>*>(row + index * V) = words;
  }
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
// its own vectors of it.
template <typename T, int V, int kKept, bool kCluster = false, typename Fetch, typename Finish>
__device__ __forceinline__ void quantize_row(Fetch fetch, Finish finish, int vectors, int8_t* q_row,
                                             float* scale_out) {
  __shared__ uint32_t scratch[kMaxWarps];
  T* const row = reinterpret_cast<T*>(shared_row);
  Vec<T, V> kept[kKept > 0 ? kKept : 1];
  uint32_t magnitude = 0;
  for_batches<kKept>(
      vectors, [&](int j, int index) { return fetch(j, index); },
      [&](int j, int index, const auto& raw) {
        const Vec<T, V> y = finish(raw);
#pragma unroll
        for (int e = 0; e < V; ++e) magnitude = max(magnitude, magnitude_bits(to_float(y.v[e])));
        if constexpr (kKept > 0) kept[j] = y;
        if constexpr (kKept == kInShared) store<T, V>(row, index, y);
      });
  magnitude = block_max(magnitude, scratch);
  if constexpr (kCluster) magnitude = cluster_max(magnitude);
  const float absmax = __uint_as_float(magnitude);
  const float scale = absmax == 0.0f ? 1.0f : __fdiv_rn(absmax, 127.0f);
  const float reciprocal = __frcp_rn(scale);
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
  if (vectors <= 4096) return launch(Instance<T, V, kInShared>{m <= kFewRows ? 1024 : 512, vectors * 16});
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

// Adds up the splits of decode attention: a row of output is rounded, or rounded and quantized per token.
#pragma once

#include "../elementwise/row.cuh"
#include "mma.cuh"
#include "params.h"

namespace fg::attention {

constexpr int kCombineVector = 4;  // elements of one head a thread computes

// Elements 4 index .. 4 index + 3 of a token's output, which are of `head`; head_vectors = D / 4; the results of kBatch
// splits are loaded together.
template <typename T, int kBatch>
__device__ __forceinline__ elementwise::Vec<T, kCombineVector> combine_splits(const float4* partial, const float2* stats,
                                                                              int splits, int num_heads,
                                                                              int head_vectors, int head,
                                                                              int index) {
  const int64_t stride = static_cast<int64_t>(num_heads) * head_vectors;
  float maximum = -INFINITY, sum = 0.0f;
  float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int first = 0; first < splits; first += kBatch) {
    float2 stat[kBatch];
    float4 part[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      stat[i] = make_float2(-INFINITY, 0.0f);
      part[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (first + i < splits) {
        stat[i] = stats[static_cast<int64_t>(first + i) * num_heads + head];
        part[i] = partial[(first + i) * stride + index];
      }
    }
    float batch_maximum = maximum;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) batch_maximum = fmaxf(batch_maximum, stat[i].x);
    // Nothing so far: 0, not 2^(-Inf + Inf).
    const float correction = sum == 0.0f ? 0.0f : exp2_approximate(maximum - batch_maximum);
    maximum = batch_maximum;
    sum *= correction;
    total.x *= correction;
    total.y *= correction;
    total.z *= correction;
    total.w *= correction;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      // The results of a split without positions have not been written.
      if (first + i < splits && stat[i].y != 0.0f) {
        const float factor = exp2_approximate(stat[i].x - maximum);
        sum = fmaf(factor, stat[i].y, sum);
        total.x = fmaf(factor, part[i].x, total.x);
        total.y = fmaf(factor, part[i].y, total.y);
        total.z = fmaf(factor, part[i].z, total.z);
        total.w = fmaf(factor, part[i].w, total.w);
      }
    }
  }
  const float y[kCombineVector] = {__fdividef(total.x, sum), __fdividef(total.y, sum), __fdividef(total.z, sum),
                                   __fdividef(total.w, sum)};
  return elementwise::rounded<T, kCombineVector>(y);
}

constexpr int kCombineThreads = 512;

// Grid (blocks of a row, rows).  Quantizing, the blocks of a row are a cluster (kKept = 1) or one block (kInShared).
template <typename T, int kKept, int kBatch, typename Out>
__global__ void __launch_bounds__(kCombineThreads, 1)
    combine(const float* partial, const float2* stats, int splits, int num_heads, int head_dim, Out* out, float* scale) {
  using namespace elementwise;
  constexpr bool kCluster = std::is_same<Out, int8_t>::value && kKept > 0;
  grid_launch_dependents();
  if constexpr (kCluster) cluster_max_prepare();
  const int64_t row = blockIdx.y;
  const int head_vectors = head_dim / kCombineVector, vectors = num_heads * head_vectors;
  // With other kKept one block has the whole row: known to the compiler, for which registers are short there.
  const int share = kKept == 1 ? (vectors + gridDim.x - 1) / gridDim.x : vectors;
  const int begin = kKept == 1 ? min(vectors, static_cast<int>(blockIdx.x) * share) : 0;
  const int count = min(share, vectors - begin);
  const float4* row_partial = reinterpret_cast<const float4*>(partial) + row * splits * vectors;
  const float2* row_stats = stats + row * splits * num_heads;
  Out* target = out + (row * vectors + begin) * kCombineVector;
  // Before the wait: a division.
  const int first_head = (begin + static_cast<int>(threadIdx.x)) / head_vectors;
  const auto fetch = [&](int, int index) {
    const int head = kKept == 1 ? first_head : (begin + index) / head_vectors;
    return combine_splits<T, kBatch>(row_partial, row_stats, splits, num_heads, head_vectors, head, begin + index);
  };
  grid_dependency_wait();
  const auto finish = [](const Vec<T, kCombineVector>& y) { return y; };
  if constexpr (std::is_same<Out, int8_t>::value)
    quantize_row<T, kCombineVector, kKept, kCluster>(fetch, finish, count, target, scale + row);
  else
    write_row<T, kCombineVector, kKept>(fetch, finish, count, target, nullptr);
}

}  // namespace fg::attention

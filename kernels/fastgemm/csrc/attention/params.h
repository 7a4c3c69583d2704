// One decode-attention call, as its kernels take it.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace fg::attention {

constexpr int kUnit = 16;         // positions a warp handles at a time
constexpr int kHeadsPerBlock = 8; // query heads that share one pass over the keys
constexpr int kMaxSplits = 64;

struct Params {
  const void* qkv;         // [batch, (num_heads + 2 kv_heads) * D]
  const float* cos_sin;    // [positions, D]
  const int32_t* lengths;  // [batch]
  void* k_cache;           // [batch, kv_heads, max_len, D]
  void* v_cache;
  float* partial;  // [batch, splits, num_heads, D]: sum over the split's positions of 2^(score - maximum) v
  float2* stats;   // [batch, splits, num_heads]: the maximum score and the sum of 2^(score - maximum); sum 0: no positions
  float scale;     // softmax_scale * log2(e)
  int num_heads, kv_heads, group, head_blocks, max_len;
  int window;  // at least 1; INT32_MAX: all positions
  int splits;
  int prefetch_blocks, prefetch_units;  // how many blocks bring how many of their units into L2 ahead of time
};

// The units of one split: an equal share of those that hold the positions `first` .. `length`.
struct Range {
  int begin, end;
};

__host__ __device__ inline Range units_of_split(int first, int length, int split, int splits) {
  const int first_unit = first / kUnit, units = length / kUnit + 1 - first_unit;
  return {first_unit + static_cast<int>(static_cast<int64_t>(units) * split / splits),
          first_unit + static_cast<int>(static_cast<int64_t>(units) * (split + 1) / splits)};
}

}  // namespace fg::attention

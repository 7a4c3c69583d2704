// One decode-attention call, as its kernels take it.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace fg::attention {

constexpr int kUnit = 16;          // positions a warp handles at a time
constexpr int kHeadsPerBlock = 8;  // query heads that share one pass over the keys
constexpr int kMaxSplits = 64;
constexpr int kMaxPositions = 1 << 24;  // of a sequence

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
  int window;  // at least 1; max_len: all positions
  int splits;
  bool cache_ready;  // no kernel that may still be running writes the caches: load them before the wait
};

// What one block does: a split of the positions of one sequence, one head of the cache, up to 8 of its query heads.
struct Work {
  int row, kv_head, first_head, heads;
  int length, first;     // the token's position, the first position it attends to
  int begin, end;        // units of the split
  int64_t cache_offset;  // elements before the cache's [max_len, D] of this sequence and head
};

// The split's equal share of the units that hold the positions `first` .. `length`.
__device__ __forceinline__ void set_length(const Params& p, Work& w, int length) {
  w.length = length;
  w.first = max(0, length - p.window + 1);
  const unsigned first_unit = w.first / kUnit, units = length / kUnit + 1 - first_unit;
  static_assert(static_cast<int64_t>(kMaxPositions / kUnit + 1) * kMaxSplits <= UINT32_MAX, "");
  w.begin = first_unit + units * blockIdx.x / p.splits;
  w.end = first_unit + units * (blockIdx.x + 1) / p.splits;
}

template <int D>
__device__ __forceinline__ Work work_of_block(const Params& p) {
  Work w{};
  w.row = blockIdx.z;
  const unsigned head_blocks = p.head_blocks, head_block = blockIdx.y % head_blocks;
  w.kv_head = blockIdx.y / head_blocks;
  w.first_head = w.kv_head * p.group + head_block * kHeadsPerBlock;
  w.heads = min(kHeadsPerBlock, p.group - static_cast<int>(head_block) * kHeadsPerBlock);
  w.cache_offset = (static_cast<int64_t>(w.row) * p.kv_heads + w.kv_head) * p.max_len * D;
  return w;
}

// Past the L1 cache: while the preceding kernel runs, another value may still be there.
__device__ __forceinline__ int load_length(const Params& p, int row) {
  int length;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(length) : "l"(p.lengths + row) : "memory");
  return length;
}

// The length itself where the token's position is in the cache, else 0.
__device__ __forceinline__ int clamp_length(const Params& p, int length) {
  return length >= 0 && length < p.max_len ? length : 0;
}

}  // namespace fg::attention

// Attention of one token of each sequence to a share of its positions, with rotary embedding and cache append.
//
// A block handles one split of the positions for one head of the cache and up to 8 of its query heads.  Its four warps
// are independent until the end: each takes every fourth unit of 16 positions through a ring of shared-memory stages of
// its own, keeps a running maximum, and multiplies with the positions as the rows of the tensor-core tile,
//
//     S^T [16 positions, 8 heads] = K Q^T        O^T [D, 8 heads] += V^T P^T
//
// so that a single query head wastes columns, not passes.  movmatrix turns the scores' fragment into that of P^T.
#pragma once

#include "../common/dependency.cuh"
#include "mma.cuh"
#include "params.h"

namespace fg::attention {

constexpr int kWarps = 4;
constexpr int kComputeThreads = 32 * kWarps;
constexpr int kPartialThreads = kComputeThreads + 32;  // and a warp that prefetches

template <int D>
struct Tile {
  static constexpr int kRowBytes = 2 * D;
  static constexpr int kBytes = kUnit * kRowBytes;  // of K or of V
  static constexpr int kStages = 384 / D;           // 96 KB for the four warps
  static constexpr int kSharedBytes = kWarps * kStages * 2 * kBytes;
  static constexpr int kOutputStride = D + 4;  // floats: four heads fall into different banks
  static_assert(kWarps * kHeadsPerBlock * kOutputStride * 4 <= kSharedBytes, "");
};

// Byte offset of 16-byte chunk `chunk` of row `row` of a tile: eight rows of a chunk lie in different banks.
template <int D>
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
  return row * Tile<D>::kRowBytes + ((chunk ^ (row & 7)) << 4);
}

struct Work {
  int row, kv_head, first_head, heads;  // the block's sequence, cache head, query heads
  int length, first;                    // the token's position, the first position it attends to
  Range units;
  int64_t cache_offset;  // elements before the cache's [max_len, D] of this sequence and head
};

template <int D>
__device__ __forceinline__ Work work_of_block(const Params& p) {
  Work w;
  w.row = blockIdx.z;
  w.kv_head = blockIdx.y / p.head_blocks;
  const int head_block = blockIdx.y % p.head_blocks;
  w.first_head = w.kv_head * p.group + head_block * kHeadsPerBlock;
  w.heads = min(kHeadsPerBlock, p.group - head_block * kHeadsPerBlock);
  w.cache_offset = (static_cast<int64_t>(w.row) * p.kv_heads + w.kv_head) * p.max_len * D;
  return w;
}

// Past the L1 cache: other values may have been there while the preceding kernel ran.
__device__ __forceinline__ int load_length(const Params& p, int row) {
  int length;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(length) : "l"(p.lengths + row) : "memory");
  return length;
}

__device__ __forceinline__ void set_length(const Params& p, Work& w, int length) {
  w.length = length;
  w.first = max(0, length - p.window + 1);
  w.units = units_of_split(w.first, length, blockIdx.x, p.splits);
}

// Brings the block's first positions into L2 while the preceding kernel finishes.  The length may still be the one
// before it: then a little less, or something else of the cache, is fetched.
template <int D>
__device__ __forceinline__ void prefetch(const Params& p) {
#if defined(FG_HAS_DEPENDENT_LAUNCH)
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  if (block >= p.prefetch_blocks || threadIdx.x % 32 >= 2) return;
  Work w = work_of_block<D>(p);
  const int length = load_length(p, w.row);
  if (length <= 0 || length >= p.max_len) return;
  set_length(p, w, length);
  const int begin = w.units.begin * kUnit;
  const int positions = min(min(w.units.end, w.units.begin + p.prefetch_units) * kUnit, length) - begin;
  if (positions <= 0) return;
  const void* cache = threadIdx.x % 32 == 0 ? p.k_cache : p.v_cache;
  ptx::bulk_prefetch(static_cast<const char*>(cache) + (w.cache_offset + static_cast<int64_t>(begin) * D) * 2,
                     positions * D * 2, ptx::policy_evict_normal());
#endif
}

// Starts the copy of a unit's keys and values; positions outside the range, and the token's own, become zeros.
template <int D>
__device__ __forceinline__ void load_unit(const Params& p, const Work& w, int unit, uint32_t stage) {
  constexpr int kChunks = D / 8, kRows = 32 / kChunks;  // rows of one instruction
  const int lane = threadIdx.x % 32, chunk = lane % kChunks;
  const int64_t offset = (w.cache_offset + static_cast<int64_t>(unit) * kUnit * D + chunk * 8) * 2;
  const char* k = static_cast<const char*>(p.k_cache) + offset;
  const char* v = static_cast<const char*>(p.v_cache) + offset;
#pragma unroll
  for (int i = 0; i < kUnit / kRows; ++i) {
    const int row = i * kRows + lane / kChunks, position = unit * kUnit + row;
    const bool valid = position >= w.first && position < w.length;
    const uint32_t target = stage + chunk_offset<D>(row, chunk);
    copy_async(target, k + row * Tile<D>::kRowBytes, valid);
    copy_async(target + Tile<D>::kBytes, v + row * Tile<D>::kRowBytes, valid);
  }
}

// The token's own key and value: elements 2 lane, 2 lane + 1 (x) and their partners D / 2 further (y).
struct NewPosition {
  uint32_t k[2], v[2];
};

template <typename T, int D>
__device__ __forceinline__ void append_position(const Params& p, const Work& w, NewPosition& n) {
  const int lane = threadIdx.x % 32;
  if (lane >= D / 4) return;
  const int heads = p.num_heads + 2 * p.kv_heads;
  const T* k = static_cast<const T*>(p.qkv) + (static_cast<int64_t>(w.row) * heads + p.num_heads + w.kv_head) * D;
  const T* v = k + static_cast<int64_t>(p.kv_heads) * D;
  const float* angles = p.cos_sin + static_cast<int64_t>(w.length) * D;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    n.k[i] = *reinterpret_cast<const uint32_t*>(k + 2 * lane + i * (D / 2));
    n.v[i] = *reinterpret_cast<const uint32_t*>(v + 2 * lane + i * (D / 2));
  }
  rotate<T>(n.k[0], n.k[1], *reinterpret_cast<const float2*>(angles + 2 * lane),
            *reinterpret_cast<const float2*>(angles + D / 2 + 2 * lane));
  if (w.first_head != w.kv_head * p.group) return;  // another block of the same cache head stores it
  const int64_t offset = w.cache_offset + static_cast<int64_t>(w.length) * D + 2 * lane;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    *reinterpret_cast<uint32_t*>(static_cast<T*>(p.k_cache) + offset + i * (D / 2)) = n.k[i];
    *reinterpret_cast<uint32_t*>(static_cast<T*>(p.v_cache) + offset + i * (D / 2)) = n.v[i];
  }
}

template <int D>
__device__ __forceinline__ void insert_position(uint32_t stage, int row, const NewPosition& n) {
  const int lane = threadIdx.x % 32;
  if (lane < D / 4) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t target = stage + chunk_offset<D>(row, lane / 4 + i * (D / 16)) + lane % 4 * 4;
      ptx::store_shared_4(target, n.k[i]);
      ptx::store_shared_4(target + Tile<D>::kBytes, n.v[i]);
    }
  }
  __syncwarp();
}

// Q^T as the second operand: register [kk][i] of a lane holds elements 16 kk + 8 i + 2 t, + 1 (t = lane % 4) of head
// lane / 4.  A pair of the rotary embedding, D / 2 apart, is in one lane.
template <typename T, int D>
__device__ __forceinline__ void load_queries(const Params& p, const Work& w, uint32_t (&q)[D / 16][2]) {
  const int lane = threadIdx.x % 32, head = lane / 4;
  const int heads = p.num_heads + 2 * p.kv_heads;
  const T* source = static_cast<const T*>(p.qkv) +
                    (static_cast<int64_t>(w.row) * heads + w.first_head + (head < w.heads ? head : 0)) * D + lane % 4 * 2;
#pragma unroll
  for (int kk = 0; kk < D / 16; ++kk) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t value = *reinterpret_cast<const uint32_t*>(source + 16 * kk + 8 * i);
      q[kk][i] = head < w.heads ? value : 0;
    }
  }
}

template <typename T, int D>
__device__ __forceinline__ void rotate_queries(const Params& p, const Work& w, uint32_t (&q)[D / 16][2]) {
  const float* angles = p.cos_sin + static_cast<int64_t>(w.length) * D + threadIdx.x % 4 * 2;
#pragma unroll
  for (int kk = 0; kk < D / 32; ++kk) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      rotate<T>(q[kk][i], q[kk + D / 32][i], *reinterpret_cast<const float2*>(angles + 16 * kk + 8 * i),
                *reinterpret_cast<const float2*>(angles + D / 2 + 16 * kk + 8 * i));
  }
}

// Online softmax of the columns (heads) 2 t and 2 t + 1 of a lane.
template <int D>
struct Softmax {
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};  // over the lane's own rows
  float output[D / 16][4] = {};
};

__device__ __forceinline__ float column_max(float v) {
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, offset));
  return v;
}

__device__ __forceinline__ float column_sum(float v) {
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

template <typename T, int D>
__device__ __forceinline__ void attend_unit(const Params& p, const Work& w, int unit, uint32_t stage,
                                            const uint32_t (&q)[D / 16][2], Softmax<D>& s) {
  const int lane = threadIdx.x % 32;
  float scores[2][4] = {};
#pragma unroll
  for (int kk = 0; kk < D / 16; ++kk) {
    uint32_t k[4];
    load_matrices(k, stage + chunk_offset<D>(lane % 16, 2 * kk + lane / 16));
    Type<T>::multiply_add(scores[kk % 2], k, q[kk][0], q[kk][1]);
  }
  float weight[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int position = unit * kUnit + lane / 4 + e / 2 * 8;
    const bool valid = position >= w.first && position <= w.length;
    weight[e] = valid ? (scores[0][e] + scores[1][e]) * p.scale : -INFINITY;
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const float maximum = fmaxf(s.maximum[j], column_max(fmaxf(weight[j], weight[j + 2])));
    const float correction = exp2_approximate(s.maximum[j] - maximum);
    s.maximum[j] = maximum;
    weight[j] = exp2_approximate(weight[j] - maximum);
    weight[j + 2] = exp2_approximate(weight[j + 2] - maximum);
    s.sum[j] = fmaf(s.sum[j], correction, weight[j] + weight[j + 2]);
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      s.output[i][j] *= correction;
      s.output[i][j + 2] *= correction;
    }
  }
  const uint32_t p0 = ptx::transpose_matrix(Type<T>::pack(weight[0], weight[1]));
  const uint32_t p1 = ptx::transpose_matrix(Type<T>::pack(weight[2], weight[3]));
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    uint32_t v[4];
    load_matrices_transposed(
        v, stage + Tile<D>::kBytes + chunk_offset<D>(lane % 8 + (lane & 16) / 2, 2 * i + lane / 8 % 2));
    Type<T>::multiply_add(s.output[i], v, p0, p1);
  }
}

// Adds up the four warps and stores the split's result.
template <int D>
__device__ __forceinline__ void store_partials(const Params& p, const Work& w, Softmax<D>& s, float* shared) {
  __shared__ float2 stats[kWarps][kHeadsPerBlock];
  constexpr int kStride = Tile<D>::kOutputStride;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  ptx::named_barrier_sync(1, kComputeThreads);  // the stages have been read
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int head = lane % 4 * 2 + j;
    const float sum = column_sum(s.sum[j]);
    if (head < w.heads) {
      if (lane < 4) stats[warp][head] = make_float2(s.maximum[j], sum);
      float* output = shared + (warp * kHeadsPerBlock + head) * kStride + lane / 4;
#pragma unroll
      for (int i = 0; i < D / 16; ++i) {
        output[16 * i] = s.output[i][j];
        output[16 * i + 8] = s.output[i][j + 2];
      }
    }
  }
  ptx::named_barrier_sync(1, kComputeThreads);
  const int64_t split = static_cast<int64_t>(w.row) * p.splits + blockIdx.x;
  for (int item = threadIdx.x; item < w.heads * (D / 4); item += kComputeThreads) {
    const int head = item / (D / 4), column = item % (D / 4) * 4;
    float maximum = -INFINITY;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) maximum = fmaxf(maximum, stats[i][head].x);
    float sum = 0.0f;
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      const float2 stat = stats[i][head];
      const float factor = stat.x == -INFINITY ? 0.0f : exp2_approximate(stat.x - maximum);
      const float4 part = *reinterpret_cast<const float4*>(shared + (i * kHeadsPerBlock + head) * kStride + column);
      sum = fmaf(factor, stat.y, sum);
      total.x = fmaf(factor, part.x, total.x);
      total.y = fmaf(factor, part.y, total.y);
      total.z = fmaf(factor, part.z, total.z);
      total.w = fmaf(factor, part.w, total.w);
    }
    const int64_t index = split * p.num_heads + w.first_head + head;
    *reinterpret_cast<float4*>(p.partial + index * D + column) = total;
    if (column == 0) p.stats[index] = make_float2(maximum, sum);
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(kPartialThreads, 2) decode_partials(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) uint8_t stages[];
  grid_launch_dependents();
  const int warp = threadIdx.x / 32;
  if (warp == kWarps) {
    prefetch<D>(p);
    return;
  }
  Work w = work_of_block<D>(p);
  uint32_t q[D / 16][2];
  grid_dependency_wait();
  load_queries<T, D>(p, w, q);
  const int length = load_length(p, w.row);
  const bool inside = length >= 0 && length < p.max_len;
  set_length(p, w, inside ? length : 0);
  if (!inside || w.units.begin == w.units.end) {
    // A sum of NaN in one split makes the token's output NaN.
    if (threadIdx.x < w.heads)
      p.stats[(static_cast<int64_t>(w.row) * p.splits + blockIdx.x) * p.num_heads + w.first_head + threadIdx.x] =
          make_float2(inside ? -INFINITY : 0.0f, inside ? 0.0f : NAN);
    return;
  }

  constexpr int kStages = Tile<D>::kStages;
  const uint32_t ring = shared_address(stages) + warp * (kStages * 2 * Tile<D>::kBytes);
  const int first_unit = w.units.begin + warp, own_unit = w.length / kUnit;
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    if (first_unit + i * kWarps < w.units.end) load_unit<D>(p, w, first_unit + i * kWarps, ring + i * 2 * Tile<D>::kBytes);
    commit_copies();
  }
  NewPosition own{};
  const bool owner = own_unit < w.units.end && (own_unit - w.units.begin) % kWarps == warp;
  if (owner) append_position<T, D>(p, w, own);
  rotate_queries<T, D>(p, w, q);

  Softmax<D> softmax;
  uint32_t stage = ring;
  for (int unit = first_unit; unit < w.units.end; unit += kWarps) {
    wait_copies<kStages - 1>();
    __syncwarp();
    if (unit == own_unit) insert_position<D>(stage, w.length % kUnit, own);
    attend_unit<T, D>(p, w, unit, stage, q, softmax);
    __syncwarp();
    const int next = unit + kStages * kWarps;
    if (next < w.units.end) load_unit<D>(p, w, next, stage);
    commit_copies();
    stage += 2 * Tile<D>::kBytes;
    if (stage == ring + kStages * 2 * Tile<D>::kBytes) stage = ring;
  }
  store_partials<D>(p, w, softmax, reinterpret_cast<float*>(stages));
}

}  // namespace fg::attention

// The block's auxiliary warp: rotary embedding of the queries and of the new key, cache append.
#pragma once

#include "../common/dependency.cuh"
#include "tile.cuh"

namespace fg::attention {

// The whole warp arrives at barrier `id` of `threads` threads, whose others synchronize.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  __syncwarp();
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Results of the auxiliary warp.
template <typename T, int D>
struct Prepared {
  uint4 q[kHeadsPerBlock * D / 8];  // Q [8, D], chunks swizzled as in a tile; rows beyond the block's heads are zero
  uint32_t k[D / 2], v[D / 2];      // the token's own key and value
};

struct Angles {
  float2 cos, sin;
};

template <int D>
__device__ __forceinline__ Angles load_angles(const Params& p, int position, int element) {
  const float* row = p.cos_sin + static_cast<int64_t>(position) * D + element;
  return {*reinterpret_cast<const float2*>(row), *reinterpret_cast<const float2*>(row + D / 2)};
}

// Lane i < D / 4 handles elements 2 i, 2 i + 1 of each head, and those they are paired with D / 2 further.
// The angles of the length before the preceding kernel are fetched with everything else, and again if it has changed it.
// Arrives at barrier `issued` of `threads` threads when its loads are on their way (the compute warps' copies would
// delay them) and at barrier `ready` when `out` is complete.
template <typename T, int D>
__device__ __forceinline__ void prepare(const Params& p, Work w, Prepared<T, D>& out, int issued, int ready, int threads) {
  const int expected = clamp_length(p, load_length(p, w.row));
  grid_dependency_wait();
  const int lane = threadIdx.x % 32, element = lane < D / 4 ? 2 * lane : 0;
  const T* token = static_cast<const T*>(p.qkv) + static_cast<int64_t>(w.row) * (p.num_heads + 2 * p.kv_heads) * D + element;
  const auto load = [&](int head, int half) {
    return *reinterpret_cast<const uint32_t*>(token + head * D + half * (D / 2));
  };
  const int length = load_length(p, w.row);
  uint32_t q[kHeadsPerBlock][2], k[2], v[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int head = 0; head < kHeadsPerBlock; ++head) q[head][half] = head < w.heads ? load(w.first_head + head, half) : 0;
    k[half] = load(p.num_heads + w.kv_head, half);
    v[half] = load(p.num_heads + p.kv_heads + w.kv_head, half);
  }
  Angles angles = load_angles<D>(p, expected, element);
  named_barrier_arrive(issued, threads);
  if (length != clamp_length(p, length)) return;
  if (length != expected) angles = load_angles<D>(p, length, element);
  set_length(p, w, length);
  if (w.begin == w.end) return;
  rotate<T>(k[0], k[1], angles.cos, angles.sin);
  if (lane < D / 4) {
    const uint32_t target = shared_address(out.q);
#pragma unroll
    for (int head = 0; head < kHeadsPerBlock; ++head) {
      rotate<T>(q[head][0], q[head][1], angles.cos, angles.sin);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        ptx::store_shared_4(target + chunk_offset<D>(head, lane / 4 + half * (D / 16)) + lane % 4 * 4,
                            head < w.heads ? q[head][half] : 0);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      out.k[lane + half * (D / 4)] = k[half];
      out.v[lane + half * (D / 4)] = v[half];
    }
  }
  named_barrier_arrive(ready, threads);
  // One block of those that share the cache head and hold the token's position stores it.
  const bool owner = w.end > length / kUnit && w.first_head == w.kv_head * p.group;
  if (owner && lane < D / 4) {
    const int64_t offset = w.cache_offset + static_cast<int64_t>(length) * D + element;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      *reinterpret_cast<uint32_t*>(static_cast<T*>(p.k_cache) + offset + half * (D / 2)) = k[half];
      *reinterpret_cast<uint32_t*>(static_cast<T*>(p.v_cache) + offset + half * (D / 2)) = v[half];
    }
  }
}

// Q^T as the second operand: register [kk][i] of a lane holds elements 16 kk + 8 i + 2 t, + 1 (t = lane % 4) of head
// lane / 4.
template <typename T, int D>
__device__ __forceinline__ void load_queries(const Prepared<T, D>& in, uint32_t (&q)[D / 16][2]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int kk = 0; kk < D / 16; kk += 2) {
    uint32_t r[4];
    load_matrices(r, shared_address(in.q) + chunk_offset<D>(lane % 8, 2 * kk + lane / 8));
    q[kk][0] = r[0], q[kk][1] = r[1], q[kk + 1][0] = r[2], q[kk + 1][1] = r[3];
  }
}

// Puts the token's own key and value into row `row` of a stage.
template <typename T, int D>
__device__ __forceinline__ void insert_position(const Prepared<T, D>& in, uint32_t stage, int row) {
  for (int i = threadIdx.x % 32; i < D / 2; i += 32) {
    const uint32_t target = stage + chunk_offset<D>(row, i / 4) + i % 4 * 4;
    ptx::store_shared_4(target, in.k[i]);
    ptx::store_shared_4(target + Tile<D>::kBytes, in.v[i]);
  }
  __syncwarp();
}

}  // namespace fg::attention

// The sm_90a GEMM kernel: one producer thread feeds a shared-memory pipeline, two consumer warpgroups multiply.
#pragma once

#include "../common/ptx_barrier.cuh"
#include "../common/ptx_copy.cuh"
#include "../common/ptx_wgmma.cuh"
#include "config.cuh"
#include "epilogue.cuh"

namespace fg::sm90 {

struct Tile {
  int row_tile, token_tile;
};

// Walks `group` token tiles for one row tile, then the next row tile, so that concurrent tiles share operands in L2.
__device__ __forceinline__ Tile tile_at(const Params& p, int index) {
  const int per_group = p.group * p.row_tiles;
  const int first = index / per_group * p.group;
  const int width = min(p.group, p.token_tiles - first);
  const int rest = index % per_group;
  return {rest / width, first + rest % width};
}

struct StagePosition {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

struct Shared {
  uint32_t stages, staging, receive, scales, full, empty, received, receive_free;
};

template <class C>
__device__ __forceinline__ void produce(const Params& p, const CUtensorMap* x_map, const CUtensorMap* w_map,
                                        const Shared& s, int rank, int first_tile, int tile_stride, int first_step,
                                        int last_step) {
  const uint64_t keep = ptx::policy_evict_last();
  const uint64_t weight_policy = p.stream_weights ? ptx::policy_evict_first() : ptx::policy_evict_normal();
  StagePosition at;
  for (int index = first_tile; index < p.row_tiles * p.token_tiles; index += tile_stride) {
    const Tile tile = tile_at(p, index);
    const int row_tile = C::kMulticast ? 2 * tile.row_tile + rank : tile.row_tile;
    const int first_block = row_tile * C::kRowBlocks;
    const int blocks = max(0, min(C::kRowBlocks, p.row_blocks - first_block));
    const uint8_t* w = p.w + static_cast<int64_t>(first_block) * p.k_blocks * kPackedTile;
    const int64_t block_stride = static_cast<int64_t>(p.k_blocks) * kPackedTile;
    for (int step = first_step; step < last_step; ++step) {
      ptx::barrier_wait(s.empty + 8 * at.stage, at.phase ^ 1);
      const uint32_t full = s.full + 8 * at.stage;
      const uint32_t tokens = s.stages + at.stage * C::kStageBytes;
      const uint32_t weights = tokens + C::kTokenBytes;
      if constexpr (C::kInt4) {
        const uint32_t bytes = min(kStepK / 64, p.k_blocks - step * (kStepK / 64)) * kPackedTile;
        ptx::barrier_arrive_expect(full, C::kTokenBytes + blocks * bytes);
        const uint8_t* source = w + static_cast<int64_t>(step) * (kStepK / 64) * kPackedTile;
#pragma unroll
        for (int b = 0; b < C::kRowBlocks; ++b) {
          if (b < blocks)
            ptx::bulk_load(weights + b * (64 * kStepK / 2), source + b * block_stride, bytes, full, weight_policy);
        }
      } else {
        ptx::barrier_arrive_expect(full, C::kStageBytes);
        ptx::tensor_load(weights, w_map, step * kStepK, row_tile * C::kRows, full, weight_policy);
      }
      const int token = tile.token_tile * C::kTokens;
      if constexpr (C::kMulticast) {
        const int half = rank * (C::kTokens / 2);
        ptx::tensor_load_multicast(tokens + half * kStepK, x_map, step * kStepK, token + half, full, 3, keep);
      } else {
        ptx::tensor_load(tokens, x_map, step * kStepK, token, full, keep);
      }
      at.advance(p.stages);
    }
  }
}

template <class C>
__device__ __forceinline__ void release_stage(const Shared& s, int stage, int lane) {
  if constexpr (C::kMulticast) {
    if (lane < 2) ptx::barrier_arrive_remote(s.empty + 8 * stage, lane);
  } else {
    if (lane == 0) ptx::barrier_arrive(s.empty + 8 * stage);
  }
}

template <class C>
__device__ __forceinline__ void pin(int (&acc)[C::kBlocks][C::kTokens / 2]) {
#pragma unroll
  for (int r = 0; r < C::kBlocks; ++r)
#pragma unroll
    for (int i = 0; i < C::kTokens / 2; ++i) ptx::wgmma_pin(acc[r][i]);
}

// Packed words of one stage -> registers: one 16-byte load per 64-row block and 64 reduction elements.
template <class C>
__device__ __forceinline__ void load_packed(uint4 (&raw)[2][C::kBlocks], uint32_t address) {
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int r = 0; r < C::kBlocks; ++r)
      raw[h][r] = ptx::load_shared_16(address + r * (64 * kStepK / 2) + h * kPackedTile);
}

__device__ __forceinline__ void unpack(uint32_t (&a)[2][4], const uint4& w) {
  a[0][0] = w.x & 0xF0F0F0F0u;
  a[0][1] = (w.x << 4) & 0xF0F0F0F0u;
  a[0][2] = w.y & 0xF0F0F0F0u;
  a[0][3] = (w.y << 4) & 0xF0F0F0F0u;
  a[1][0] = w.z & 0xF0F0F0F0u;
  a[1][1] = (w.z << 4) & 0xF0F0F0F0u;
  a[1][2] = w.w & 0xF0F0F0F0u;
  a[1][3] = (w.w << 4) & 0xF0F0F0F0u;
}

// int4: the A fragments are double-buffered; those of one half step are built while the tensor cores run the other.
template <class C>
__device__ __forceinline__ void multiply_int4(int (&acc)[C::kBlocks][C::kTokens / 2], const Params& p, const Shared& s,
                                              StagePosition& at, int steps, int group, int lane) {
  const uint32_t thread_weights =
      s.stages + C::kTokenBytes + group * C::kBlocks * (64 * kStepK / 2) + threadIdx.x % 128 * 16;
  uint4 raw[2][C::kBlocks];
  uint32_t fragment[2][C::kBlocks][2][4];
  ptx::barrier_wait(s.full + 8 * at.stage, at.phase);
  load_packed<C>(raw, thread_weights + at.stage * C::kStageBytes);
  int previous = 0;
  for (int step = 0; step < steps; ++step) {
    const uint64_t tokens = ptx::swizzled_descriptor(s.stages + at.stage * C::kStageBytes);
    const int current = at.stage;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int r = 0; r < C::kBlocks; ++r) unpack(fragment[h][r], raw[h][r]);
#pragma unroll
      for (int i = 0; i < 8 * C::kBlocks; ++i) ptx::wgmma_pin(fragment[h][i / 8][i / 4 % 2][i % 4]);
      pin<C>(acc);
      ptx::wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < 2; ++kk)
#pragma unroll
        for (int r = 0; r < C::kBlocks; ++r)
          ptx::Wgmma<C::kTokens>::rs(acc[r], fragment[h][r][kk], tokens + 4 * h + 2 * kk, step | h | kk);
      ptx::wgmma_commit();
      if (h == 0) {
        ptx::wgmma_wait<1>();
        if (step > 0) release_stage<C>(s, previous, lane);
      } else {
        at.advance(p.stages);
        if (step + 1 < steps) {
          ptx::barrier_wait(s.full + 8 * at.stage, at.phase);
          load_packed<C>(raw, thread_weights + at.stage * C::kStageBytes);
        }
        ptx::wgmma_wait<1>();
      }
    }
    previous = current;
  }
  ptx::wgmma_wait<0>();
  pin<C>(acc);
  release_stage<C>(s, previous, lane);
}

template <class C>
__device__ __forceinline__ void multiply_int8(int (&acc)[C::kBlocks][C::kTokens / 2], const Params& p, const Shared& s,
                                              StagePosition& at, int steps, int group, int lane) {
  int previous = 0;
  for (int step = 0; step < steps; ++step) {
    ptx::barrier_wait(s.full + 8 * at.stage, at.phase);
    const uint32_t base = s.stages + at.stage * C::kStageBytes;
    const uint64_t tokens = ptx::swizzled_descriptor(base);
    const uint64_t weights = ptx::swizzled_descriptor(base + C::kTokenBytes + group * C::kBlocks * 64 * kStepK);
    pin<C>(acc);
    ptx::wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk)
#pragma unroll
      for (int r = 0; r < C::kBlocks; ++r)
        ptx::Wgmma<C::kTokens>::ss(acc[r], weights + r * (64 * kStepK / 16) + 2 * kk, tokens + 2 * kk, step | kk);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    if (step > 0) release_stage<C>(s, previous, lane);
    previous = at.stage;
    at.advance(p.stages);
  }
  ptx::wgmma_wait<0>();
  pin<C>(acc);
  release_stage<C>(s, previous, lane);
}

// Adds up the partial sums of the cluster's CTAs; CTA `rank` keeps the pieces [rank * share, (rank + 1) * share).
// Integer sums are exact, so the result does not depend on the order.
template <class C>
__device__ __forceinline__ void reduce_cluster(int (&acc)[C::kBlocks][C::kTokens / 2], const Params& p, const Shared& s,
                                               int rank, int share, uint32_t parity, bool last_tile, int lane) {
  // Slot of source CTA c at destination d: c - (c > d), so that the split - 1 slots are dense.
  const uint32_t thread_slot = s.receive + threadIdx.x * 16;
#pragma unroll
  for (int q = 0; q < C::kPieces; ++q) {
    const int owner = q / share;
    if (owner != rank) {
      const int slot = (rank - (rank > owner)) * share + q - owner * share;
      const int* v = &acc[q / (C::kTokens / 8)][q % (C::kTokens / 8) * 4];
      ptx::store_remote_16(thread_slot + slot * (kConsumerThreads * 16), owner, v[0], v[1], v[2], v[3]);
    }
  }
  __syncwarp();
  if (lane < p.split && lane != rank) ptx::barrier_arrive_remote(s.received, lane);
  ptx::barrier_wait_cluster(s.received, parity);
#pragma unroll
  for (int q = 0; q < C::kPieces; ++q) {
    if (q / share == rank) {
      int* v = &acc[q / (C::kTokens / 8)][q % (C::kTokens / 8) * 4];
      for (int source = 0; source < p.split - 1; ++source) {
        const uint4 part =
            ptx::load_shared_16(thread_slot + (source * share + q - rank * share) * (kConsumerThreads * 16));
        v[0] += part.x;
        v[1] += part.y;
        v[2] += part.z;
        v[3] += part.w;
      }
    }
  }
  __syncwarp();
  if (!last_tile && lane < p.split && lane != rank) ptx::barrier_arrive_remote(s.receive_free, lane);
}

template <class C>
__device__ __forceinline__ void consume(const Params& p, const CUtensorMap* out_map, const Shared& s, int rank,
                                        int first_tile, int tile_stride, int steps) {
  const int group = threadIdx.x / 128, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const uint32_t scales = s.scales + group * C::kTokens * 4;
  const uint32_t staging = s.staging + group * 2 * C::kStoreBytes;
  const int tiles = p.row_tiles * p.token_tiles;
  StagePosition at;
  uint32_t parity = 0;
  bool first = true;
  for (int index = first_tile; index < tiles; index += tile_stride) {
    const Tile tile = tile_at(p, index);
    const int row_tile = C::kMulticast ? 2 * tile.row_tile + rank : tile.row_tile;
    const int block_row = row_tile * C::kRows + group * C::kBlocks * 64;
    const int row = block_row + 16 * warp;
    const int token = tile.token_tile * C::kTokens;

    RowFactors factors[C::kBlocks];
#pragma unroll
    for (int r = 0; r < C::kBlocks; ++r) factors[r] = load_row_factors<C>(p, row + 64 * r + lane / 4);
    constexpr int kScaleLoads = (C::kTokens + 127) / 128;
    float x_scale[kScaleLoads];
#pragma unroll
    for (int i = 0; i < kScaleLoads; ++i)
      x_scale[i] = p.out_dtype == FG_I32 ? 0.f
                                         : __ldg(p.x_scale + min(token + 128 * i + static_cast<int>(threadIdx.x % 128),
                                                                 p.m - 1));

    int acc[C::kBlocks][C::kTokens / 2];
    if constexpr (C::kInt4) multiply_int4<C>(acc, p, s, at, steps, group, lane);
    else multiply_int8<C>(acc, p, s, at, steps, group, lane);

    int first_piece = 0, last_piece = C::kPieces;
    if (p.split > 1) {
      const int share = (C::kPieces + p.split - 1) / p.split;
      if (first) ptx::cluster_wait();
      else ptx::barrier_wait_cluster(s.receive_free, parity ^ 1);
      reduce_cluster<C>(acc, p, s, rank, share, parity, index + tile_stride >= tiles, lane);
      first_piece = rank * share;
      last_piece = first_piece + share;
    }
#pragma unroll
    for (int i = 0; i < kScaleLoads; ++i) {
      const int local = 128 * i + threadIdx.x % 128;
      if (local < C::kTokens) ptx::store_shared_4(scales + local * 4, __float_as_uint(x_scale[i]));
    }
    ptx::named_barrier_sync(1 + group, 128);
    if (C::kTensorStore && p.split == 1) {
      if (p.out_dtype == FG_F16)
        store_tensor<C, FG_F16>(p, out_map, acc, factors, scales, staging, block_row, token, 1 + group);
      else if (p.out_dtype == FG_BF16)
        store_tensor<C, FG_BF16>(p, out_map, acc, factors, scales, staging, block_row, token, 1 + group);
      else
        store_tensor<C, FG_F32>(p, out_map, acc, factors, scales, staging, block_row, token, 1 + group);
    } else {
      if (p.out_dtype == FG_F16)
        store_direct<C, FG_F16>(p, acc, factors, scales, row, token, first_piece, last_piece);
      else if (p.out_dtype == FG_BF16)
        store_direct<C, FG_BF16>(p, acc, factors, scales, row, token, first_piece, last_piece);
      else
        store_direct<C, FG_F32>(p, acc, factors, scales, row, token, first_piece, last_piece);
      // The next tile overwrites the scales.
      ptx::named_barrier_sync(1 + group, 128);
    }
    parity ^= 1;
    first = false;
  }
  if (p.split > 1 && first) ptx::cluster_wait();
  if (C::kTensorStore && p.split == 1 && threadIdx.x % 128 == 0) ptx::bulk_wait_read<0>();
}

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_kernel(const __grid_constant__ Params p, const __grid_constant__ CUtensorMap x_map,
                const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap out_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t shared_memory[];
  const SharedLayout layout = shared_layout<C>(p.stages, p.split);
  const uint32_t base = (ptx::smem_address(shared_memory) + 1023) & ~1023u;
  const Shared s{base,
                 base + layout.staging,
                 base + layout.receive,
                 base + layout.scales,
                 base + layout.barriers,
                 base + layout.barriers + 8 * kMaxStages,
                 base + layout.barriers + 16 * kMaxStages,
                 base + layout.barriers + 16 * kMaxStages + 8};
  const int cluster_size = C::kMulticast ? 2 : p.split;
  const int rank = cluster_size > 1 ? static_cast<int>(ptx::cluster_rank()) : 0;
  const int first_tile = blockIdx.x / cluster_size, tile_stride = gridDim.x / cluster_size;
  const int split_rank = C::kMulticast ? 0 : rank;
  const int first_step = static_cast<int>(static_cast<int64_t>(p.k_steps) * split_rank / p.split);
  const int last_step = static_cast<int>(static_cast<int64_t>(p.k_steps) * (split_rank + 1) / p.split);

  if (threadIdx.x == kConsumerThreads) {
    ptx::prefetch_tensor_map(&x_map);
    if (!C::kInt4) ptx::prefetch_tensor_map(&w_map);
    for (int i = 0; i < p.stages; ++i) {
      ptx::barrier_init(s.full + 8 * i, 1);
      ptx::barrier_init(s.empty + 8 * i, kConsumerWarps * (C::kMulticast ? 2 : 1));
    }
    ptx::barrier_init(s.received, kConsumerWarps * (p.split - 1) + (p.split == 1));
    ptx::barrier_init(s.receive_free, kConsumerWarps * (p.split - 1) + (p.split == 1));
    ptx::fence_barrier_init();
  }
  __syncthreads();
  if (cluster_size > 1) {
    ptx::cluster_arrive();
    if (C::kMulticast) ptx::cluster_wait();
  }

  if (threadIdx.x >= kConsumerThreads) {
    ptx::registers_decrease<56>();
    if (threadIdx.x == kConsumerThreads)
      produce<C>(p, &x_map, &w_map, s, rank, first_tile, tile_stride, first_step, last_step);
    __syncwarp();
    if (p.split > 1) ptx::cluster_wait();
  } else {
    ptx::registers_increase<224>();
    consume<C>(p, &out_map, s, rank, first_tile, tile_stride, last_step - first_step);
  }
  if (C::kMulticast) {
    // No CTA may leave while its pair still writes to its shared memory.
    __syncwarp();
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
#endif
}

}  // namespace fg::sm90

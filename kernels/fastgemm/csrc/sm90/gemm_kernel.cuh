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

// The tiles of one CTA: first whole tiles, then tiles whose reduction it shares with its cluster.
struct Schedule {
  int index;

  __device__ __forceinline__ explicit Schedule(const Params& p) : index(blockIdx.x) {
    if (shared(p)) enter_shared(p);
  }
  __device__ __forceinline__ bool valid(const Params& p) const { return index < p.row_tiles * p.token_tiles; }
  __device__ __forceinline__ bool shared(const Params& p) const { return index >= p.whole_tiles; }
  __device__ __forceinline__ void advance(const Params& p) {
    if (shared(p)) {
      index += gridDim.x >> p.split_shift;
    } else {
      index += gridDim.x;
      if (shared(p)) enter_shared(p);
    }
  }
  __device__ __forceinline__ bool last(const Params& p) const {
    return index + static_cast<int>(gridDim.x >> p.split_shift) >= p.row_tiles * p.token_tiles;
  }

 private:
  __device__ __forceinline__ void enter_shared(const Params& p) {
    index = p.whole_tiles + (blockIdx.x >> p.split_shift);
  }
};

// Pipeline steps of a tile that fall to this CTA.
struct StepRange {
  int first, last;
};

__device__ __forceinline__ StepRange steps_of(const Params& p, bool shared, int rank) {
  if (!shared) return {0, p.k_steps};
  return {(p.k_steps * rank) >> p.split_shift, (p.k_steps * (rank + 1)) >> p.split_shift};
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
  uint32_t stages, exchange, scales, full, empty, received, receive_free;
};

// Weights of one pipeline step into a stage, or (kPrefetch) only into L2.
template <class C, bool kPrefetch>
__device__ __forceinline__ void load_weights(const Params& p, const CUtensorMap* w_map, uint32_t stage, uint32_t full,
                                             int row_tile, int step, uint64_t policy) {
  const uint32_t weights = stage + C::kTokenBytes;
  if constexpr (C::kInt4) {
    const int first_block = row_tile * C::kRowBlocks;
    const int blocks = min(C::kRowBlocks, p.row_blocks - first_block);
    const uint32_t bytes = min(kStepK / 64, p.k_blocks - step * (kStepK / 64)) * kPackedTile;
    if (!kPrefetch) ptx::barrier_arrive_expect(full, C::kTokenBytes + blocks * bytes);
    const int64_t block_stride = static_cast<int64_t>(p.k_blocks) * kPackedTile;
    const uint8_t* source = p.w + first_block * block_stride + static_cast<int64_t>(step) * (kStepK / 64) * kPackedTile;
#pragma unroll
    for (int b = 0; b < C::kRowBlocks; ++b) {
      if (b >= blocks) continue;
      if constexpr (kPrefetch) ptx::bulk_prefetch(source + b * block_stride, bytes, policy);
      else ptx::bulk_load(weights + b * (64 * kStepK / 2), source + b * block_stride, bytes, full, policy);
    }
  } else {
    if constexpr (kPrefetch) {
      ptx::tensor_prefetch(w_map, step * kStepK, row_tile * C::kRows, policy);
    } else {
      ptx::barrier_arrive_expect(full, C::kStageBytes);
      ptx::tensor_load(weights, w_map, step * kStepK, row_tile * C::kRows, full, policy);
    }
  }
}

// Fills the pipeline.  While the preceding kernel may still run, the first weights are brought into L2, or into the
// stages where it is known not to write them.
template <class C>
__device__ __forceinline__ void produce(const Params& p, const CUtensorMap* x_map, const CUtensorMap* w_map,
                                        const Shared& s, int rank) {
  const uint64_t keep = ptx::policy_evict_last();
  const uint64_t weight_policy = p.stream_weights ? ptx::policy_evict_first() : ptx::policy_evict_normal();
  StagePosition at;
  bool started = false;
  for (Schedule work(p); work.valid(p); work.advance(p)) {
    const Tile tile = tile_at(p, work.index);
    const StepRange range = steps_of(p, work.shared(p), rank);
    const int token = tile.token_tile * C::kTokens;
    int requested = range.first;
    if (!started) {
      const int ahead = min(range.last, range.first + p.stages);
#pragma unroll 1
      for (int step = range.first; step < ahead; ++step) {
        const int i = step - range.first;
        if (p.prefetch_weights)
          load_weights<C, false>(p, w_map, s.stages + i * C::kStageBytes, s.full + 8 * i, tile.row_tile, step,
                                 weight_policy);
        else
          load_weights<C, true>(p, w_map, 0, 0, tile.row_tile, step, weight_policy);
      }
      if (p.prefetch_weights) requested = ahead;
      ptx::grid_dependency_wait();
      started = true;
    }
#pragma unroll 1
    for (int step = range.first; step < range.last; ++step) {
      const uint32_t full = s.full + 8 * at.stage, stage = s.stages + at.stage * C::kStageBytes;
      if (step >= requested) {
        ptx::barrier_wait(s.empty + 8 * at.stage, at.phase ^ 1);
        load_weights<C, false>(p, w_map, stage, full, tile.row_tile, step, weight_policy);
      }
      ptx::tensor_load(stage, x_map, step * kStepK, token, full, keep);
      at.advance(p.stages);
    }
  }
}

__device__ __forceinline__ void release_stage(const Shared& s, int stage, int lane) {
  if (lane == 0) ptx::barrier_arrive(s.empty + 8 * stage);
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
        if (step > 0) release_stage(s, previous, lane);
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
  release_stage(s, previous, lane);
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
    if (step > 0) release_stage(s, previous, lane);
    previous = at.stage;
    at.advance(p.stages);
  }
  ptx::wgmma_wait<0>();
  pin<C>(acc);
  release_stage(s, previous, lane);
}

// Adds up the partial sums of the kSplit CTAs of a cluster and stores the result: CTA `rank` owns the pieces from
// rank * kShare on.  Integer sums are exact, so the result does not depend on the order.
template <class C, int kSplit>
__device__ __forceinline__ void reduce_and_store(const int (&acc)[C::kBlocks][C::kTokens / 2], const Params& p,
                                                 const Shared& s, const RowFactors (&factors)[C::kBlocks],
                                                 uint32_t scales, int row, int token, int rank, uint32_t parity,
                                                 bool last_tile, int lane) {
  constexpr int kShare = pieces_per_owner<C>(kSplit);
  constexpr int kPerBlock = C::kTokens / 8;
  constexpr int kPieceBytes = kConsumerThreads * 16;
  // The kSplit - 1 slots of a receiver: source CTA c writes slot c - (c > receiver).
  const uint32_t thread_slot = s.exchange + opaque(threadIdx.x) * 16;
#pragma unroll
  for (int owner = 0; owner < kSplit; ++owner) {
    if (owner * kShare < C::kPieces && owner != rank) {
      const uint32_t slot =
          ptx::remote_address(thread_slot + (rank - (rank > owner)) * kShare * kPieceBytes, owner);
      const uint32_t received = ptx::remote_address(s.received, owner);
#pragma unroll
      for (int i = 0; i < kShare; ++i) {
        const int q = owner * kShare + i;
        if (q < C::kPieces)
          ptx::store_remote_16(slot + i * kPieceBytes, received, &acc[q / kPerBlock][q % kPerBlock * 4]);
      }
    }
  }
  if (rank * kShare < C::kPieces) ptx::barrier_wait(s.received, parity);
  int sum[kShare][4];
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      sum[i][e] = acc[i / kPerBlock][i % kPerBlock * 4 + e];
#pragma unroll
      for (int owner = 1; owner < kSplit; ++owner) {
        const int q = owner * kShare + i;
        if (q < C::kPieces && owner == rank) sum[i][e] = acc[q / kPerBlock][q % kPerBlock * 4 + e];
      }
    }
#pragma unroll
    for (int source = 0; source < kSplit - 1; ++source) {
      const uint4 part = ptx::load_shared_16(thread_slot + (source * kShare + i) * kPieceBytes);
      sum[i][0] += static_cast<int>(part.x);
      sum[i][1] += static_cast<int>(part.y);
      sum[i][2] += static_cast<int>(part.z);
      sum[i][3] += static_cast<int>(part.w);
    }
    // Few loads in flight at a time: more would not fit in the registers.
    if (i % 2 == 1) {
#pragma unroll
      for (int e = 0; e < 8; ++e) ptx::wgmma_pin(sum[i - e / 4][e % 4]);
    }
  }
  __syncwarp();
  if (!last_tile && rank * kShare < C::kPieces && lane < kSplit && lane != rank)
    ptx::barrier_arrive_remote(ptx::remote_address(s.receive_free, lane));
  // The pieces of an owner lie in one block of rows.
  static_assert(kPerBlock % kShare == 0, "");
  const int first = rank * kShare, block = first / kPerBlock, local = 8 * (first % kPerBlock);
  if (first < C::kPieces) {
    const RowFactors f = C::kBlocks > 1 && block > 0 ? factors[C::kBlocks - 1] : factors[0];
    store_pieces<C, kShare>(p, sum, f, scales + local * 4, row + 64 * block, token + local);
  }
}

template <class C>
__device__ __forceinline__ void consume(const Params& p, const CUtensorMap* out_map, const Shared& s, int rank) {
  const int group = threadIdx.x / 128, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int group_barrier = 1 + group;
  const uint32_t group_scales = s.scales + group * C::kTokens * 4;
  const uint32_t staging = s.exchange + group * 2 * C::kStoreBytes;
  StagePosition at;
  int shared_tiles = 0;
  ptx::grid_dependency_wait();
  // Not earlier: whoever starts now can rely on everything before the preceding kernel being finished.
  ptx::grid_launch_dependents();
  for (Schedule work(p); work.valid(p); work.advance(p)) {
    const Tile tile = tile_at(p, work.index);
    const int block_row = tile.row_tile * C::kRows + group * C::kBlocks * 64;
    const int row = block_row + 16 * warp;
    const int token = tile.token_tile * C::kTokens;
    const StepRange range = steps_of(p, work.shared(p), rank);

    RowFactors factors[C::kBlocks];
#pragma unroll
    for (int r = 0; r < C::kBlocks; ++r) factors[r] = load_row_factors<C>(p, row + 64 * r + lane / 4);
    constexpr int kScaleLoads = (C::kTokens + 127) / 128;
    float x_scale[kScaleLoads];
#pragma unroll
    for (int i = 0; i < kScaleLoads; ++i) {
      const int local = 128 * i + static_cast<int>(threadIdx.x % 128);
      x_scale[i] = p.out_dtype == FG_I32 ? 0.f : __ldg(p.x_scale + min(token + local, p.m - 1));
    }
    if (work.shared(p) && shared_tiles == 0 && p.split > 1) {
      // From here on the exchange area belongs to the cluster: earlier tensor stores must have read it.
      if (p.whole_tiles > 0) {
        if (threadIdx.x % 128 == 0) ptx::bulk_wait_read<0>();
        __syncwarp();
        ptx::cluster_arrive();
      } else {
        ptx::cluster_arrive_relaxed();
      }
    }
    if (work.shared(p) && threadIdx.x == 0) ptx::barrier_arrive_expect(s.received, receive_bytes<C>(p.split, rank));

    int acc[C::kBlocks][C::kTokens / 2];
    if constexpr (C::kInt4) multiply_int4<C>(acc, p, s, at, range.last - range.first, group, lane);
    else multiply_int8<C>(acc, p, s, at, range.last - range.first, group, lane);

#pragma unroll
    for (int i = 0; i < kScaleLoads; ++i) {
      const int local = 128 * i + threadIdx.x % 128;
      if (local < C::kTokens) ptx::store_shared_4(group_scales + local * 4, __float_as_uint(x_scale[i]));
    }
    ptx::named_barrier_sync(group_barrier, 128);
    const uint32_t scales = opaque(group_scales);
    if (work.shared(p)) {
      const uint32_t parity = shared_tiles % 2;
      if (shared_tiles == 0) ptx::cluster_wait();
      else if (receivers<C>(p.split, rank) > 0) ptx::barrier_wait_cluster(s.receive_free, parity ^ 1);
      const bool last = work.last(p);
      if (p.split == 2) reduce_and_store<C, 2>(acc, p, s, factors, scales, row, token, rank, parity, last, lane);
      else if (p.split == 4) reduce_and_store<C, 4>(acc, p, s, factors, scales, row, token, rank, parity, last, lane);
      else reduce_and_store<C, 8>(acc, p, s, factors, scales, row, token, rank, parity, last, lane);
      ++shared_tiles;
    } else if constexpr (C::kTensorStore) {
      if (p.out_dtype == FG_F16)
        store_tensor<C, FG_F16>(p, out_map, acc, factors, scales, staging, block_row, token, group_barrier);
      else if (p.out_dtype == FG_BF16)
        store_tensor<C, FG_BF16>(p, out_map, acc, factors, scales, staging, block_row, token, group_barrier);
      else
        store_tensor<C, FG_F32>(p, out_map, acc, factors, scales, staging, block_row, token, group_barrier);
    } else {
#pragma unroll
      for (int r = 0; r < C::kBlocks; ++r)
        store_pieces<C, C::kTokens / 8>(p, reinterpret_cast<const int(&)[C::kTokens / 8][4]>(acc[r]), factors[r], scales,
                                        row + 64 * r, token);
    }
    // The next tile overwrites the scales.
    ptx::named_barrier_sync(group_barrier, 128);
  }
  if (p.split > 1 && shared_tiles == 0) {
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
  }
  if (C::kTensorStore && threadIdx.x % 128 == 0) ptx::bulk_wait_read<0>();
}

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_kernel(const __grid_constant__ Params p, const __grid_constant__ CUtensorMap x_map,
                const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap out_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t shared_memory[];
  const SharedLayout layout = shared_layout<C>(p.stages, p.split, C::kTensorStore && p.whole_tiles > 0);
  const uint32_t base = (ptx::smem_address(shared_memory) + 1023) & ~1023u;
  const Shared s{base,
                 base + layout.exchange,
                 base + layout.scales,
                 base + layout.barriers,
                 base + layout.barriers + 8 * kMaxStages,
                 base + layout.barriers + 16 * kMaxStages,
                 base + layout.barriers + 16 * kMaxStages + 8};
  const int rank = p.split > 1 ? static_cast<int>(ptx::cluster_rank()) : 0;

  if (threadIdx.x == kConsumerThreads) {
    ptx::prefetch_tensor_map(&x_map);
    if (!C::kInt4) ptx::prefetch_tensor_map(&w_map);
    for (int i = 0; i < p.stages; ++i) {
      ptx::barrier_init(s.full + 8 * i, 1);
      ptx::barrier_init(s.empty + 8 * i, kConsumerWarps);
    }
    ptx::barrier_init(s.received, 1);
    ptx::barrier_init(s.receive_free, max(1, kConsumerWarps * receivers<C>(p.split, rank)));
    ptx::fence_barrier_init();
  }
  __syncthreads();

  if (threadIdx.x >= kConsumerThreads) {
    ptx::registers_decrease<40>();
    if (p.split > 1) ptx::cluster_arrive_relaxed();
    if (threadIdx.x == kConsumerThreads) produce<C>(p, &x_map, &w_map, s, rank);
    __syncwarp();
    if (p.split > 1) ptx::cluster_wait();
  } else {
    ptx::registers_increase<232>();
    consume<C>(p, &out_map, s, rank);
  }
#endif
}

}  // namespace fg::sm90

// The sm_90a GEMM kernel: two producer threads (with group scales three) feed a shared-memory pipeline, one or two
// warpgroups multiply.
#pragma once

#include <type_traits>

#include "../common/ptx_barrier.cuh"
#include "../common/ptx_copy.cuh"
#include "config.cuh"
#include "epilogue.cuh"
#include "multiply.cuh"
#include "multiply_grouped.cuh"
#include "produce.cuh"
#include "reduce.cuh"
#include "schedule.cuh"
#include "zero_point.cuh"

namespace fg::sm90 {

template <int kValue>
using Split = std::integral_constant<int, kValue>;

template <class C>
__device__ __forceinline__ void consume(const Params& p, const CUtensorMap* out_map, const Shared& s, int rank) {
  const int group = threadIdx.x / 128, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int group_barrier = 1 + group;
  constexpr int kConsumersBarrier = 3;
  const uint32_t group_scales = s.scales + group * C::kTokens * 4;
  constexpr int kToSums = C::kWarpgroups * C::kTokens * 4;  // from a token's scale to its sum (ZeroPointConfig)
  const uint32_t staging = s.exchange + group * 2 * C::kStoreBytes;
  static_assert(C::kOnePieceShares != C::kTensorStore, "each tile has one way to its store");
  StagePosition at;
  int shared_tiles = 0;
  Schedule work(p);
  if (p.split > 1) ptx::cluster_wait();
  ptx::grid_dependency_wait();
  // Not earlier: whoever starts now can rely on everything before the preceding kernel being finished.
  ptx::grid_launch_dependents();
  for (; work.valid(p); work.advance(p)) {
    const Tile tile = tile_at<C>(p, work.index);
    const int block_row = tile.row_tile * C::kRows + group * 64;
    const int row = block_row + 16 * warp;
    const int token = tile.token_tile * C::kTokens;
    const StepRange range = steps_of(p, work.shared(p), rank);

    const RowFactors factors = load_row_factors<C>(p, row + lane / 4);
    constexpr int kScaleLoads = (C::kTokens + 127) / 128;
    float x_scale[kScaleLoads];
#pragma unroll
    for (int i = 0; i < kScaleLoads; ++i) {
      const int local = 128 * i + static_cast<int>(threadIdx.x % 128);
      x_scale[i] = p.out_dtype == FG_I32 ? 0.f : __ldg(p.x_scale + min(token + local, p.m - 1));
    }
    const ZeroPoints zero = load_zero_points<C>(p, row + lane / 4);
    int x_sum[kScaleLoads];
    if constexpr (C::kZeroPoint) {
#pragma unroll
      for (int i = 0; i < kScaleLoads; ++i)
        x_sum[i] = __ldg(p.x_sum + min(token + 128 * i + static_cast<int>(threadIdx.x % 128), p.m - 1));
    }
    if constexpr (C::kTensorStore) {
      if (work.shared(p) && shared_tiles == 0 && p.whole_tiles > 0) {
        // From here on the exchange area belongs to the cluster: earlier tensor stores must have read it.  All consumers
        // meet, since a place that one warpgroup wrote may next be read by the other: the way round through the cluster
        // orders that, too, but not for racecheck to see.
        if (threadIdx.x % 128 == 0) ptx::bulk_wait_read<0>();
        ptx::named_barrier_sync(kConsumersBarrier, C::kConsumerThreads);
        report_free<C>(p, s, rank, lane);
      }
    }
    if (work.shared(p) && threadIdx.x == 0) ptx::barrier_arrive_expect(s.received, receive_bytes<C>(p.split, rank));

    int acc[C::kTokens / 2];
    const int steps = range.last - range.first;
    if constexpr (C::kGrouped) multiply_grouped<C>(acc, p, s, at, steps, group, lane);
    else if constexpr (C::kInt4 && C::kFewTokens) multiply_int4_few<C>(acc, p, s, at, steps, group, lane);
    else if constexpr (C::kInt4) multiply_int4<C>(acc, p, s, at, steps, group, lane);
    else multiply_int8<C>(acc, p, s, at, steps, group, lane);

#pragma unroll
    for (int i = 0; i < kScaleLoads; ++i) {
      const int local = 128 * i + threadIdx.x % 128;
      if (local < C::kTokens) ptx::store_shared_4(group_scales + local * 4, __float_as_uint(x_scale[i]));
      if constexpr (C::kZeroPoint) {
        if (local < C::kTokens) ptx::store_shared_4(group_scales + kToSums + local * 4, x_sum[i]);
      }
    }
    ptx::named_barrier_sync(group_barrier, 128);
    const uint32_t scales = opaque(group_scales);
    if constexpr (C::kZeroPoint) {
      // Of the CTAs whose sums are added up, one.
      if (!work.shared(p) || rank == 0) subtract_zero_points<C>(acc, zero, scales + kToSums, lane);
    }
    if constexpr (C::kOnePieceShares) {
      if (work.shared(p)) {
        const uint32_t parity = shared_tiles % 2;
        if (shared_tiles > 0 && receivers<C>(p.split, rank) > 0)
          ptx::barrier_wait_cluster(s.receive_free, parity ^ 1);
        reduce_one_piece<C>(acc, p, s, rank, parity, work.last(p), lane);
        ++shared_tiles;
      }
#pragma unroll
      for (int q = 0; q < C::kPieces; ++q) {
        if (!work.shared(p) || q == rank)
          store_pieces<C, 1>(p, reinterpret_cast<const int(&)[1][4]>(acc[4 * q]), factors, scales + 8 * q * 4, row,
                             token + 8 * q);
      }
    } else if (work.shared(p)) {
      const uint32_t parity = shared_tiles % 2;
      const int reports = shared_tiles + (p.whole_tiles > 0);  // of each receiver, by now
      if (reports > 0 && receivers<C>(p.split, rank) > 0)
        ptx::barrier_wait_cluster(s.receive_free, (reports - 1) % 2);
      const bool last = work.last(p);
      const auto reduce = [&](auto split) {
        reduce_and_store<C, decltype(split)::value>(acc, p, s, factors, scales, row, token, rank, parity, last, lane);
      };
      if (p.split == 2) {
        reduce(Split<2>{});
      } else if (p.split == 4) {
        reduce(Split<4>{});
      } else if (C::kThirds && p.split == 3) {
        if constexpr (C::kThirds) reduce(Split<3>{});
      } else {
        reduce(Split<8>{});
      }
      ++shared_tiles;
    } else {
      if (p.out_dtype == FG_F16)
        store_tensor<C, FG_F16>(p, out_map, acc, factors, scales, staging, block_row, token, group_barrier);
      else if (p.out_dtype == FG_BF16)
        store_tensor<C, FG_BF16>(p, out_map, acc, factors, scales, staging, block_row, token, group_barrier);
      else
        store_tensor<C, FG_F32>(p, out_map, acc, factors, scales, staging, block_row, token, group_barrier);
    }
    // The next tile overwrites the scales.
    ptx::named_barrier_sync(group_barrier, 128);
  }
  if (C::kTensorStore && threadIdx.x % 128 == 0) ptx::bulk_wait_read<0>();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    gemm_kernel(const __grid_constant__ Params p, const __grid_constant__ CUtensorMap x_map,
                const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap out_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t shared_memory[];
  const SharedLayout layout = shared_layout<C>(p.stages, p.split, C::kTensorStore && p.whole_tiles > 0);
  const uint32_t base = (ptx::smem_address(shared_memory) + 1023) & ~1023u;
  Shared s{base,
           base + layout.exchange,
           base + layout.scales,
           base + layout.barriers,
           base + layout.barriers + 8 * kMaxStages,
           base + layout.barriers + 16 * kMaxStages,
           base + layout.barriers + 16 * kMaxStages + 8,
           base + layout.barriers + (C::kFewTokens ? 16 * kMaxStages + 16 : 0),
           base + layout.weight_scales,
           base + layout.barriers + 8 * kMaxStages};
  const bool shares = C::kShares && p.share != kShareNothing;
  const int rank = p.split > 1 || shares ? static_cast<int>(ptx::cluster_rank()) : 0;

  if (threadIdx.x == C::kConsumerThreads) {
    ptx::prefetch_tensor_map(&x_map);
    ptx::prefetch_tensor_map(&w_map);
    for (int i = 0; i < p.stages; ++i) {
      ptx::barrier_init(s.full + 8 * i, C::kFewTokens ? 1 : 2 + C::kGrouped);
      if (C::kFewTokens) ptx::barrier_init(s.full_tokens + 8 * i, 1 + C::kGrouped);
      ptx::barrier_init(s.empty + 8 * i, shares ? 2 * C::kConsumerWarps : C::kConsumerWarps);
    }
    ptx::barrier_init(s.received, 1);
    ptx::barrier_init(s.receive_free, max(1, C::kConsumerWarps * receivers<C>(p.split, rank)));
    ptx::fence_barrier_init();
  }
  __syncthreads();
  // Whoever writes to another CTA of the cluster waits for this.  All threads arrive, and at once: under
  // compute-sanitizer a thread that arrives may be held until all have.
  if (p.split > 1) ptx::cluster_arrive_relaxed();
  if (shares) {
    // Both have initialised their barriers before either loads into the other or reports to it.
    s.release = ptx::remote_address(s.empty, threadIdx.x % 2);
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
  }

  // One consumer warpgroup: the registers suffice as they are.
  if (threadIdx.x >= C::kConsumerThreads) {
    if constexpr (C::kWarpgroups > 1) ptx::registers_decrease<40>();
    // Each of these threads waits for the cluster, as all do, and before it depends on the consumers: under
    // compute-sanitizer a thread that waits may be held until all do.
    if (threadIdx.x == C::kConsumerThreads) {
      produce_weights<C>(p, &w_map, s, rank);
    } else if (threadIdx.x == C::kConsumerThreads + 32) {
      produce_tokens<C>(p, &x_map, s, rank);
    } else if (C::kGrouped && threadIdx.x == C::kConsumerThreads + 64) {
      if constexpr (C::kGrouped) produce_group_scales<C>(p, s, rank);
    } else if (p.split > 1) {
      ptx::cluster_wait_alone();
    }
  } else {
    if constexpr (C::kWarpgroups > 1) ptx::registers_increase<232>();
    consume<C>(p, &out_map, s, rank);
  }
#endif
}

}  // namespace fg::sm90

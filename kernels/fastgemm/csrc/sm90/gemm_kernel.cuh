// The sm_90a GEMM kernel: two producer threads feed a shared-memory pipeline, one or two warpgroups multiply.
#pragma once

#include <type_traits>

#include "../common/ptx_barrier.cuh"
#include "../common/ptx_copy.cuh"
#include "config.cuh"
#include "epilogue.cuh"
#include "multiply.cuh"
#include "produce.cuh"
#include "schedule.cuh"

namespace fg::sm90 {

template <int kValue>
using Split = std::integral_constant<int, kValue>;

// A receiver of partial sums tells the other CTAs of the cluster that this warp has read its exchange area.
template <class C>
__device__ __forceinline__ void report_free(const Params& p, const Shared& s, int rank, int lane) {
  __syncwarp();
  if (rank * pieces_per_owner<C>(p.split) < C::kPieces && lane < p.split && lane != rank)
    ptx::barrier_arrive_remote(ptx::remote_address(s.receive_free, lane));
}

// Adds up the partial sums of the kSplit CTAs of a cluster and stores the result: CTA `rank` owns the pieces from
// rank * kShare on.  Integer sums are exact, so the result does not depend on the order.
template <class C, int kSplit>
__device__ __forceinline__ void reduce_and_store(const int (&acc)[C::kTokens / 2], const Params& p, const Shared& s,
                                                 const RowFactors& factors, uint32_t scales, int row, int token,
                                                 int rank, uint32_t parity, bool last_tile, int lane) {
  constexpr int kShare = pieces_per_owner<C>(kSplit);
  static_assert(C::kPieces % kShare == 0, "");
  constexpr int kPieceBytes = C::kConsumerThreads * 16;
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
        if (q < C::kPieces) ptx::store_remote_16(slot + i * kPieceBytes, received, &acc[4 * q]);
      }
    }
  }
  if (rank * kShare < C::kPieces) ptx::barrier_wait(s.received, parity);
  int sum[kShare][4];
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      sum[i][e] = acc[4 * i + e];
#pragma unroll
      for (int owner = 1; owner < kSplit; ++owner) {
        const int q = owner * kShare + i;
        if (q < C::kPieces && owner == rank) sum[i][e] = acc[4 * q + e];
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
  if (!last_tile) report_free<C>(p, s, rank, lane);
  const int local = 8 * rank * kShare;
  if (local < C::kTokens) store_pieces<C, kShare>(p, sum, factors, scales + local * 4, row, token + local);
}

// The same for tiles of at most two pieces, any number of CTAs and without the store: every piece has an owner of its own,
// which keeps its sum in acc.  Little code for the instruction cache, which a chain of small kernels fills.
template <class C>
__device__ __forceinline__ void reduce_one_piece(int (&acc)[C::kTokens / 2], const Params& p, const Shared& s, int rank,
                                                 uint32_t parity, bool last_tile, int lane) {
  constexpr int kPieceBytes = C::kConsumerThreads * 16;
  const uint32_t thread_slot = s.exchange + opaque(threadIdx.x) * 16;
#pragma unroll
  for (int q = 0; q < C::kPieces; ++q) {
    if (q == rank) continue;
    const uint32_t slot = ptx::remote_address(thread_slot + (rank - (rank > q)) * kPieceBytes, q);
    ptx::store_remote_16(slot, ptx::remote_address(s.received, q), &acc[4 * q]);
  }
  if (rank >= C::kPieces) return;
  ptx::barrier_wait(s.received, parity);
#pragma unroll 1
  for (int source = 0; source < p.split - 1; ++source) {
    const uint4 part = ptx::load_shared_16(thread_slot + source * kPieceBytes);
#pragma unroll
    for (int q = 0; q < C::kPieces; ++q) {
      if (q != rank) continue;
      acc[4 * q] += static_cast<int>(part.x);
      acc[4 * q + 1] += static_cast<int>(part.y);
      acc[4 * q + 2] += static_cast<int>(part.z);
      acc[4 * q + 3] += static_cast<int>(part.w);
    }
  }
  if (!last_tile) report_free<C>(p, s, rank, lane);
}

template <class C>
__device__ __forceinline__ void consume(const Params& p, const CUtensorMap* out_map, const Shared& s, int rank) {
  const int group = threadIdx.x / 128, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int group_barrier = 1 + group;
  const uint32_t group_scales = s.scales + group * C::kTokens * 4;
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
    if constexpr (C::kTensorStore) {
      if (work.shared(p) && shared_tiles == 0 && p.whole_tiles > 0) {
        // From here on the exchange area belongs to the cluster: earlier tensor stores must have read it.
        if (threadIdx.x % 128 == 0) ptx::bulk_wait_read<0>();
        ptx::named_barrier_sync(group_barrier, 128);
        report_free<C>(p, s, rank, lane);
      }
    }
    if (work.shared(p) && threadIdx.x == 0) ptx::barrier_arrive_expect(s.received, receive_bytes<C>(p.split, rank));

    int acc[C::kTokens / 2];
    const int steps = range.last - range.first;
    if constexpr (C::kInt4 && C::kFewTokens) multiply_int4_few<C>(acc, p, s, at, steps, group, lane);
    else if constexpr (C::kInt4) multiply_int4<C>(acc, p, s, at, steps, group, lane);
    else multiply_int8<C>(acc, p, s, at, steps, group, lane);

#pragma unroll
    for (int i = 0; i < kScaleLoads; ++i) {
      const int local = 128 * i + threadIdx.x % 128;
      if (local < C::kTokens) ptx::store_shared_4(group_scales + local * 4, __float_as_uint(x_scale[i]));
    }
    ptx::named_barrier_sync(group_barrier, 128);
    const uint32_t scales = opaque(group_scales);
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
           base + layout.barriers + 8 * kMaxStages};
  const bool shares = C::kShares && p.share != kShareNothing;
  const int rank = p.split > 1 || shares ? static_cast<int>(ptx::cluster_rank()) : 0;

  if (threadIdx.x == C::kConsumerThreads) {
    ptx::prefetch_tensor_map(&x_map);
    if (!C::kInt4) ptx::prefetch_tensor_map(&w_map);
    for (int i = 0; i < p.stages; ++i) {
      ptx::barrier_init(s.full + 8 * i, C::kFewTokens ? 1 : 2);
      if (C::kFewTokens) ptx::barrier_init(s.full_tokens + 8 * i, 1);
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
    if (threadIdx.x == C::kConsumerThreads) produce_weights<C>(p, &w_map, s, rank);
    else if (threadIdx.x == C::kConsumerThreads + 32) produce_tokens<C>(p, &x_map, s, rank);
    __syncwarp();
    if (p.split > 1) ptx::cluster_wait();
  } else {
    if constexpr (C::kWarpgroups > 1) ptx::registers_increase<232>();
    consume<C>(p, &out_map, s, rank);
  }
#endif
}

}  // namespace fg::sm90

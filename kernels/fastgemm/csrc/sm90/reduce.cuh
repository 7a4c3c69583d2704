// The sum over the CTAs of a cluster that share the reduction of a tile.
#pragma once

#include "../common/ptx_barrier.cuh"
#include "../common/ptx_copy.cuh"
#include "../common/ptx_wgmma.cuh"
#include "config.cuh"
#include "epilogue.cuh"
#include "schedule.cuh"

namespace fg::sm90 {

// A receiver of partial sums tells the other CTAs of the cluster that this warp has read its exchange area.
template <class C>
__device__ __forceinline__ void report_free(const Params& p, const Shared& s, int rank, int lane) {
  __syncwarp();
  if (rank * pieces_per_owner<C>(p.split) < C::kPieces && lane < p.split && lane != rank)
    ptx::barrier_arrive_remote(ptx::remote_address(s.receive_free, lane));
}

// The sum over the `split` CTAs of a cluster of fp32 numbers (group scales): `sum` holds the bits of this CTA's and gets
// those of the sum, added in the order of the ranks whichever CTA adds.  part(i): what the i-th of the other CTAs sent.
template <int kUnroll, class Part>
__device__ __forceinline__ void add_in_order(int (&sum)[4], int split, int rank, Part part) {
  float own[4], total[4] = {};
#pragma unroll
  for (int e = 0; e < 4; ++e) own[e] = __int_as_float(sum[e]);
#pragma unroll kUnroll
  for (int source = 0; source < split; ++source) {
    const bool mine = source == rank;
    const uint4 other = part(min(source - (source > rank), split - 2));  // not used if mine
    total[0] = __fadd_rn(total[0], mine ? own[0] : __uint_as_float(other.x));
    total[1] = __fadd_rn(total[1], mine ? own[1] : __uint_as_float(other.y));
    total[2] = __fadd_rn(total[2], mine ? own[2] : __uint_as_float(other.z));
    total[3] = __fadd_rn(total[3], mine ? own[3] : __uint_as_float(other.w));
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) sum[e] = __float_as_int(total[e]);
}

// Adds up the partial sums of the kSplit CTAs of a cluster and stores the result: CTA `rank` owns the pieces from
// rank * kShare on.  Integer sums are exact, so their order does not matter.
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
    if constexpr (C::kGrouped) {
      add_in_order<kSplit>(sum[i], kSplit, rank, [&](int slot) {
        return ptx::load_shared_16(thread_slot + (slot * kShare + i) * kPieceBytes);
      });
    } else {
#pragma unroll
      for (int source = 0; source < kSplit - 1; ++source) {
        const uint4 part = ptx::load_shared_16(thread_slot + (source * kShare + i) * kPieceBytes);
        sum[i][0] += static_cast<int>(part.x);
        sum[i][1] += static_cast<int>(part.y);
        sum[i][2] += static_cast<int>(part.z);
        sum[i][3] += static_cast<int>(part.w);
      }
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
  if constexpr (C::kGrouped) {
#pragma unroll
    for (int q = 0; q < C::kPieces; ++q) {
      if (q != rank) continue;
      add_in_order<1>(reinterpret_cast<int(&)[4]>(acc[4 * q]), p.split, rank,
                      [&](int slot) { return ptx::load_shared_16(thread_slot + slot * kPieceBytes); });
    }
  } else {
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
  }
  if (!last_tile) report_free<C>(p, s, rank, lane);
}

}  // namespace fg::sm90

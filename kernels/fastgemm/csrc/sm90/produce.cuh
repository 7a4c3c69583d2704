// The producer threads: bulk and tensor copies into the pipeline.
#pragma once

#include "../common/ptx_barrier.cuh"
#include "../common/ptx_copy.cuh"
#include "config.cuh"
#include "schedule.cuh"

namespace fg::sm90 {

// Weights of one pipeline step into a stage, or (kPrefetch) only into L2.
template <class C, bool kPrefetch>
__device__ __forceinline__ void load_weights(const Params& p, const CUtensorMap* w_map, uint32_t stage, uint32_t full,
                                             int row_tile, int step, uint64_t policy) {
  const uint32_t weights = stage + C::kTokenBytes;
  if constexpr (C::kInt4) {
    constexpr int kTiles = C::kStepK / 64;
    const int first_block = row_tile * C::kRowBlocks;
    const int blocks = min(C::kRowBlocks, p.row_blocks - first_block);
    const uint32_t bytes = min(kTiles, p.k_blocks - step * kTiles) * kPackedTile;
    if (!kPrefetch) ptx::barrier_arrive_expect(full, blocks * bytes);
    const int64_t block_stride = static_cast<int64_t>(p.k_blocks) * kPackedTile;
    const uint8_t* source = p.w + first_block * block_stride + static_cast<int64_t>(step) * kTiles * kPackedTile;
#pragma unroll
    for (int b = 0; b < C::kRowBlocks; ++b) {
      if (b >= blocks) continue;
      if constexpr (kPrefetch) ptx::bulk_prefetch(source + b * block_stride, bytes, policy);
      else ptx::bulk_load(weights + b * (kTiles * kPackedTile), source + b * block_stride, bytes, full, policy);
    }
  } else {
    if constexpr (kPrefetch) {
      ptx::tensor_prefetch(w_map, step * kBoxK, row_tile * C::kRows, policy);
    } else {
      ptx::barrier_arrive_expect(full, C::kWeightBytes);
      ptx::tensor_load(weights, w_map, step * kBoxK, row_tile * C::kRows, full, policy);
    }
  }
}

// While the preceding kernel may still run, brings the weights of the first stages into L2, or into the stages where
// it is known not to write them: at the pace of the device memory, because the preceding kernel's few accesses would queue
// behind a burst of loads.  Returns how many stages are on their way.
template <class C>
__device__ __forceinline__ int load_ahead(const Params& p, const CUtensorMap* w_map, const Shared& s, int rank,
                                          uint64_t policy) {
  int count = 0;
  const int64_t start = clock64();
  for (Schedule work(p); work.valid(p) && count < p.ahead_steps; work.advance(p)) {
    const Tile tile = tile_at(p, work.index);
    const StepRange range = steps_of(p, work.shared(p), rank);
#pragma unroll 1
    for (int step = range.first; step < range.last && count < p.ahead_steps; ++step, ++count) {
      if (C::kPaced && p.weights_ready) {
        while (clock64() - start < (count - 1) * C::kPaceCycles) {
        }
      }
      if (p.weights_ready)
        load_weights<C, false>(p, w_map, s.stages + count * C::kStageBytes, s.full + 8 * count, tile.row_tile, step,
                               policy);
      else
        load_weights<C, true>(p, w_map, 0, 0, tile.row_tile, step, policy);
    }
  }
  return p.weights_ready ? count : 0;
}

// Fills the pipeline with weights.
template <class C>
__device__ __forceinline__ void produce_weights(const Params& p, const CUtensorMap* w_map, const Shared& s, int rank) {
  const uint64_t policy = p.stream_weights ? ptx::policy_evict_first() : ptx::policy_evict_normal();
  int requested = load_ahead<C>(p, w_map, s, rank, policy);
  if (!p.weights_ready) ptx::grid_dependency_wait();
  StagePosition at;
  for (Schedule work(p); work.valid(p); work.advance(p)) {
    const int row_tile = tile_at(p, work.index).row_tile;
    const StepRange range = steps_of(p, work.shared(p), rank);
#pragma unroll 1
    for (int step = range.first; step < range.last; ++step) {
      if (--requested < 0) {
        ptx::barrier_wait(s.empty + 8 * at.stage, at.phase ^ 1);
        load_weights<C, false>(p, w_map, s.stages + at.stage * C::kStageBytes, s.full + 8 * at.stage, row_tile, step,
                               policy);
      }
      at.advance(p.stages);
    }
  }
}

// Fills the pipeline with tokens.  A thread of its own: the weights of a stage take one about as long to request as they
// take to arrive, and the tokens of the first stages should not queue behind them.
template <class C>
__device__ __forceinline__ void produce_tokens(const Params& p, const CUtensorMap* x_map, const Shared& s, int rank) {
  const uint64_t policy = ptx::policy_evict_last();
  ptx::grid_dependency_wait();
  StagePosition at;
  for (Schedule work(p); work.valid(p); work.advance(p)) {
    const int token = tile_at(p, work.index).token_tile * C::kTokens;
    const StepRange range = steps_of(p, work.shared(p), rank);
#pragma unroll 1
    for (int step = range.first; step < range.last; ++step) {
      const uint32_t full = s.full + 8 * at.stage, stage = s.stages + at.stage * C::kStageBytes;
      ptx::barrier_wait(s.empty + 8 * at.stage, at.phase ^ 1);
      ptx::barrier_arrive_expect(full, C::kTokenBytes);
#pragma unroll
      for (int k = 0; k < C::kStepK; k += kBoxK)
        ptx::tensor_load(stage + k * C::kTokens, x_map, step * C::kStepK + k, token, full, policy);
      at.advance(p.stages);
    }
  }
}

}  // namespace fg::sm90

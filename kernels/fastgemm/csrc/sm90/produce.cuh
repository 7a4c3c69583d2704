// The producer thread: bulk and tensor copies into the pipeline.
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

}  // namespace fg::sm90

// The producer threads: copies into the pipeline.  Weights and tokens travel as tensor copies, whose arrival at a barrier
// compute-sanitizer's racecheck understands; it takes plain bulk copies into a stage that is used again for races
// (the group scales of the ablation still are such).
#pragma once

#include "../common/ptx_barrier.cuh"
#include "../common/ptx_copy.cuh"
#include "config.cuh"
#include "schedule.cuh"

namespace fg::sm90 {

// Weights of one pipeline step into a stage, or (kPrefetch) only into L2; shared weights: this CTA's half, for both.
template <class C, bool kPrefetch>
__device__ __forceinline__ void load_weights(const Params& p, const CUtensorMap* w_map, uint32_t stage, uint32_t full,
                                             int row_tile, int step, int rank, uint64_t policy) {
  const uint32_t weights = stage + C::kTokenBytes;
  if constexpr (C::kInt4) {
    // Whole boxes of packed tiles: what lies behind the last column multiplies tokens that are zero.
    constexpr int kTiles = C::kStepK / 64;
    const int first_block = row_tile * C::kWarpgroups;
    const int blocks = max(0, min(C::kWarpgroups, p.row_blocks - first_block));
    if (!kPrefetch) ptx::barrier_arrive_expect(full, blocks * (kTiles * kPackedTile));
#pragma unroll
    for (int b = 0; b < C::kWarpgroups; ++b) {
      if (b >= blocks) continue;
      const int tile = (first_block + b) * p.k_blocks + step * kTiles;
      if constexpr (kPrefetch) ptx::tensor_prefetch(w_map, 0, tile, policy);
      else ptx::tensor_load(weights + b * (kTiles * kPackedTile), w_map, 0, tile, full, policy);
    }
  } else {
    if (!kPrefetch) ptx::barrier_arrive_expect(full, C::kWeightBytes);
    const bool halves = C::kSharesWeights && p.share == kShareWeights;
    const int half = halves ? rank * (C::kRows / 2) : 0;
#pragma unroll
    for (int k = 0; k < C::kStepK; k += kBoxK) {
      const int column = step * C::kStepK + k, row = row_tile * C::kRows + half;
      const uint32_t target = weights + k * C::kRows + half * kBoxK;
      if constexpr (kPrefetch) ptx::tensor_prefetch(w_map, column, row, policy);
      else if (halves) ptx::tensor_load_pair(target, w_map, column, row, full, policy);
      else ptx::tensor_load(target, w_map, column, row, full, policy);
    }
  }
}

// While the preceding kernel may still run, brings the weights of the first stages into L2, or into the stages where
// it is known not to write them: few at a time, because the preceding kernel's few accesses would queue behind a burst
// of loads.  Returns how many stages are on their way.
template <class C>
__device__ __forceinline__ int load_ahead(const Params& p, const CUtensorMap* w_map, const Shared& s, int rank,
                                          uint64_t policy) {
  int count = 0;
  for (Schedule work(p); work.valid(p) && count < p.ahead_steps; work.advance(p)) {
    const Tile tile = tile_at<C>(p, work.index);
    const StepRange range = steps_of(p, work.shared(p), rank);
#pragma unroll 1
    for (int step = range.first; step < range.last && count < p.ahead_steps; ++step, ++count) {
      if (C::kFewTokens && p.weights_ready && count >= C::kAheadStages)
        ptx::barrier_wait(s.full + 8 * (count - C::kAheadStages), 0);
      if (p.weights_ready)
        load_weights<C, false>(p, w_map, s.stages + count * C::kStageBytes, s.full + 8 * count, tile.row_tile, step,
                               rank, policy);
      else
        load_weights<C, true>(p, w_map, 0, 0, tile.row_tile, step, rank, policy);
    }
  }
  return p.weights_ready ? count : 0;
}

// Fills the pipeline with weights.
template <class C>
__device__ __forceinline__ void produce_weights(const Params& p, const CUtensorMap* w_map, const Shared& s, int rank) {
  const uint64_t policy = p.stream_weights ? ptx::policy_evict_first() : ptx::policy_evict_unchanged();
  int requested = load_ahead<C>(p, w_map, s, rank, policy);
  if (p.split > 1) ptx::cluster_wait_alone();
  if (!p.weights_ready) ptx::grid_dependency_wait();
  StagePosition at;
  for (Schedule work(p); work.valid(p); work.advance(p)) {
    const int row_tile = tile_at<C>(p, work.index).row_tile;
    const StepRange range = steps_of(p, work.shared(p), rank);
#pragma unroll 1
    for (int step = range.first; step < range.last; ++step) {
      if (--requested < 0) {
        ptx::barrier_wait(s.empty + 8 * at.stage, at.phase ^ 1);
        load_weights<C, false>(p, w_map, s.stages + at.stage * C::kStageBytes, s.full + 8 * at.stage, row_tile, step,
                               rank, policy);
      }
      at.advance(p.stages);
    }
  }
}

// Scales of the groups of one step for the rows of a tile.  A last stage that is not full gets the last group twice: what
// they multiply is 0, because columns of tokens that do not exist are.
template <class C, bool kPrefetch>
__device__ __forceinline__ void load_group_scales(const Params& p, uint32_t target, uint32_t full, int row_tile, int step,
                                                  uint64_t policy) {
  const int row = row_tile * C::kRows, groups = p.k_blocks / (kGroupSize / 64);
  const uint32_t bytes = min(C::kRows, p.n - row) * 4;
  if (!kPrefetch) ptx::barrier_arrive_expect(full, C::kGroups * bytes);
#pragma unroll
  for (int h = 0; h < C::kGroups; ++h) {
    const int group = min(step * C::kGroups + h, groups - 1);
    const float* source = p.w_scale + static_cast<int64_t>(group) * p.n + row;
    if constexpr (kPrefetch) ptx::bulk_prefetch(source, bytes, policy);
    else ptx::bulk_load(target + h * C::kRows * 4, source, bytes, full, policy);
  }
}

// Fills the pipeline with group scales, which are loaded ahead as the weights are.  A thread of its own, like the tokens.
template <class C>
__device__ __forceinline__ void produce_group_scales(const Params& p, const Shared& s, int rank) {
  const uint64_t policy = p.stream_weights ? ptx::policy_evict_first() : ptx::policy_evict_unchanged();
  if (!p.weights_ready) {
    int count = 0;
    for (Schedule work(p); work.valid(p) && count < p.ahead_steps; work.advance(p)) {
      const int row_tile = tile_at<C>(p, work.index).row_tile;
      const StepRange range = steps_of(p, work.shared(p), rank);
#pragma unroll 1
      for (int step = range.first; step < range.last && count < p.ahead_steps; ++step, ++count)
        load_group_scales<C, true>(p, 0, 0, row_tile, step, policy);
    }
    ptx::grid_dependency_wait();
  }
  if (p.split > 1) ptx::cluster_wait_alone();
  StagePosition at;
  for (Schedule work(p); work.valid(p); work.advance(p)) {
    const int row_tile = tile_at<C>(p, work.index).row_tile;
    const StepRange range = steps_of(p, work.shared(p), rank);
#pragma unroll 1
    for (int step = range.first; step < range.last; ++step) {
      ptx::barrier_wait(s.empty + 8 * at.stage, at.phase ^ 1);
      load_group_scales<C, false>(p, s.weight_scales + at.stage * C::kScaleBytes, s.full_tokens + 8 * at.stage, row_tile,
                                  step, policy);
      at.advance(p.stages);
    }
  }
}

// Fills the pipeline with tokens; shared tokens: with the half of this CTA, for both.  A thread of its own: the weights
// of a stage take one about as long to request as they take to arrive, and the tokens of the first stages should not
// queue behind them.
template <class C>
__device__ __forceinline__ void produce_tokens(const Params& p, const CUtensorMap* x_map, const Shared& s, int rank) {
  const uint64_t policy = ptx::policy_evict_last();
  const bool halves = C::kShares && p.share == kShareTokens;
  const int half = halves ? rank * (C::kTokens / 2) : 0;
  Schedule work(p);
  if (p.split > 1) ptx::cluster_wait_alone();
  ptx::grid_dependency_wait();
  StagePosition at;
  for (; work.valid(p); work.advance(p)) {
    const int token = tile_at<C>(p, work.index).token_tile * C::kTokens + half;
    const StepRange range = steps_of(p, work.shared(p), rank);
#pragma unroll 1
    for (int step = range.first; step < range.last; ++step) {
      const uint32_t full = s.full_tokens + 8 * at.stage, stage = s.stages + at.stage * C::kStageBytes;
      ptx::barrier_wait(s.empty + 8 * at.stage, at.phase ^ 1);
      ptx::barrier_arrive_expect(full, C::kTokenBytes);
#pragma unroll
      for (int k = 0; k < C::kStepK; k += kBoxK) {
        const uint32_t target = stage + k * C::kTokens + half * kBoxK;
        if (halves) ptx::tensor_load_pair(target, x_map, step * C::kStepK + k, token, full, policy);
        else ptx::tensor_load(target, x_map, step * C::kStepK + k, token, full, policy);
      }
      at.advance(p.stages);
    }
  }
  // The other CTA of a pair reports the stages it has read to this one, which must not have exited by then.
  if (C::kShares && p.share != kShareNothing) {
    for (int i = 0; i < p.stages; ++i) {
      ptx::barrier_wait(s.empty + 8 * at.stage, at.phase ^ 1);
      at.advance(p.stages);
    }
  }
}

}  // namespace fg::sm90

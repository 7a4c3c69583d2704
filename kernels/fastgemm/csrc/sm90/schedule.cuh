// Which tiles and which steps of their reduction a CTA computes, and where its pipeline lies.
#pragma once

#include "../common/ptx_barrier.cuh"
#include "config.cuh"

namespace fg::sm90 {

struct Tile {
  int row_tile, token_tile;
};

// Walks `group` token units for one row unit, then the next row unit, so that concurrent tiles share operands in L2.
// Indices 2i and 2i + 1 are the tiles of a unit that two CTAs compute together.
template <class C>
__device__ __forceinline__ Tile tile_at(const Params& p, int index) {
  // Divisions take long enough to be seen between two kernels.
  if constexpr (C::kFewTokens) return Tile{index, 0};
  const int unit = p.share == kShareNothing ? index : index / 2;
  const int per_group = p.group * p.row_units;
  const int first = unit / per_group * p.group;
  const int width = min(p.group, p.token_units - first);
  const int rest = unit % per_group;
  Tile tile{rest / width, first + rest % width};
  if (p.share == kShareTokens) tile.row_tile = 2 * tile.row_tile + index % 2;
  if (p.share == kShareWeights) tile.token_tile = 2 * tile.token_tile + index % 2;
  return tile;
}

// The tiles of one CTA: first whole tiles, then tiles whose reduction it shares with its cluster.
struct Schedule {
  int index;

  __device__ __forceinline__ explicit Schedule(const Params& p) : index(blockIdx.x) {
    if (shared(p)) enter_shared(p);
  }
  __device__ __forceinline__ bool valid(const Params& p) const { return index < p.tiles; }
  __device__ __forceinline__ bool shared(const Params& p) const { return index >= p.whole_tiles; }
  __device__ __forceinline__ void advance(const Params& p) {
    if (shared(p)) {
      index += p.clusters;
    } else {
      index += gridDim.x;
      if (shared(p)) enter_shared(p);
    }
  }
  __device__ __forceinline__ bool last(const Params& p) const {
    return index + p.clusters >= p.tiles;
  }

 private:
  __device__ __forceinline__ void enter_shared(const Params& p) {
    index = p.whole_tiles + ptx::cluster_index();
  }
};

// Pipeline steps of a tile that fall to this CTA.
struct StepRange {
  int first, last;
};

__device__ __forceinline__ StepRange steps_of(const Params& p, bool shared, int rank) {
  if (!shared) return {0, p.k_steps};
  return {p.share_steps[rank], p.share_steps[rank + 1]};
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
  uint32_t stages, exchange, scales;
  uint32_t full, empty, received, receive_free;  // full: of a stage, or with kFewTokens of its weights
  uint32_t full_tokens;                          // the same as `full`, or with kFewTokens of a stage's tokens
  uint32_t weight_scales;  // of the stages (GroupedConfig)
  uint32_t release;  // `empty` of this CTA, or of CTA lane % 2 of the cluster
};

}  // namespace fg::sm90

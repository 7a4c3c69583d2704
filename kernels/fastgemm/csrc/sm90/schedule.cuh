// Which tiles and which steps of their reduction a CTA computes, and where its pipeline lies.
#pragma once

#include "config.cuh"

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
      index += p.clusters;
    } else {
      index += gridDim.x;
      if (shared(p)) enter_shared(p);
    }
  }
  __device__ __forceinline__ bool last(const Params& p) const {
    return index + p.clusters >= p.row_tiles * p.token_tiles;
  }

 private:
  __device__ __forceinline__ void enter_shared(const Params& p) {
    index = p.whole_tiles + (blockIdx.x / p.split);
  }
};

// Pipeline steps of a tile that fall to this CTA.
struct StepRange {
  int first, last;
};

__device__ __forceinline__ StepRange steps_of(const Params& p, bool shared, int rank) {
  if (!shared) return {0, p.k_steps};
  return {p.k_steps * rank / p.split, p.k_steps * (rank + 1) / p.split};
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

}  // namespace fg::sm90

// Tiles of 16 positions of K and of V in shared memory.
#pragma once

#include "mma.cuh"
#include "params.h"

namespace fg::attention {

template <int D>
struct Tile {
  static constexpr int kRowBytes = 2 * D;
  static constexpr int kBytes = kUnit * kRowBytes;  // of K or of V
  static constexpr int kStageBytes = 2 * kBytes;
};

// Byte offset of 16-byte chunk `chunk` of row `row`: eight rows of a chunk lie in different banks.
template <int D>
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
  return row * Tile<D>::kRowBytes + ((chunk ^ (row & 7)) << 4);
}

// Starts the copy of a unit's keys and values to a stage (aligned to 128 bytes); positions outside the range, and the
// token's own, become zeros.  k and v: the cache of this sequence and head.
template <int D>
__device__ __forceinline__ void load_unit(const Work& w, const char* k, const char* v, int unit, uint32_t stage) {
  constexpr int kChunks = D / 8, kRows = 32 / kChunks;  // rows of one instruction: a power of two below 8
  const int lane = threadIdx.x % 32, first_row = lane / kChunks;
  const int64_t offset = static_cast<int64_t>(unit) * Tile<D>::kBytes + lane * 16;
  k += offset;
  v += offset;
  // Row i * kRows + first_row: the two summands share no bits, so the swizzle splits into two exclusive-ors.
  const uint32_t target = stage + chunk_offset<D>(first_row, lane % kChunks);
  if (unit * kUnit >= w.first && unit * kUnit + kUnit <= w.length) {
#pragma unroll
    for (int i = 0; i < kUnit / kRows; ++i) {
      const uint32_t row_target = (target ^ ((i * kRows & 7) << 4)) + i * kRows * Tile<D>::kRowBytes;
      copy_async_16(row_target, k + i * kRows * Tile<D>::kRowBytes);
      copy_async_16(row_target + Tile<D>::kBytes, v + i * kRows * Tile<D>::kRowBytes);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kUnit / kRows; ++i) {
      const int position = unit * kUnit + i * kRows + first_row;
      const bool valid = position >= w.first && position < w.length;
      const uint32_t row_target = (target ^ ((i * kRows & 7) << 4)) + i * kRows * Tile<D>::kRowBytes;
      copy_async(row_target, k + i * kRows * Tile<D>::kRowBytes, valid);
      copy_async(row_target + Tile<D>::kBytes, v + i * kRows * Tile<D>::kRowBytes, valid);
    }
  }
}

}  // namespace fg::attention

// What zero points add to the kernel (ZeroPointConfig): one multiply-add per accumulator of a tile.
#pragma once

#include "../common/ptx_copy.cuh"
#include "config.cuh"

namespace fg::sm90 {

// 16 (zero - 8) of rows `row` and `row` + 8: the accumulators hold 16 times the sums.
struct ZeroPoints {
  int value[2];
};

template <class C>
__device__ __forceinline__ ZeroPoints load_zero_points(const Params& p, int row) {
  ZeroPoints zero{};
  if constexpr (C::kZeroPoint) {
#pragma unroll
    for (int i = 0; i < 2; ++i) zero.value[i] = 16 * (__ldg(p.zero + min(row + 8 * i, p.n - 1)) - 8);
  }
  return zero;
}

// sums: x_sum of the tile's tokens in shared memory.
template <class C>
__device__ __forceinline__ void subtract_zero_points(int (&acc)[C::kTokens / 2], const ZeroPoints& zero, uint32_t sums,
                                                     int lane) {
#pragma unroll
  for (int q = 0; q < C::kPieces; ++q) {
    const float2 bits = ptx::load_shared_float2(sums + (8 * q + 2 * (lane % 4)) * 4);
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[4 * q + e] -= zero.value[e / 2] * __float_as_int(e % 2 ? bits.y : bits.x);
  }
}

}  // namespace fg::sm90

// From int32 accumulators to the output: (float(acc) * x_scale) * w_scale (+ bias), rounded to the output type.
//
// Accumulator layout of a thread (wgmma m64nN): acc[4 * j + 0, 1] = row g, tokens 8j + 2t, 8j + 2t + 1 and
// acc[4 * j + 2, 3] = row g + 8, with g = lane / 4, t = lane % 4 and rows counted from 16 * (warp of the warpgroup).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/ptx_barrier.cuh"
#include "../common/ptx_copy.cuh"
#include "../fastgemm.h"
#include "config.cuh"

namespace fg::sm90 {

// Hides where a value comes from, so that what is computed from it stays inside the loop over tiles instead of
// occupying registers throughout the main loop.
template <class Word>
__device__ __forceinline__ Word opaque(Word value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Scales and bias of the two rows (g, g + 8) a thread holds of one 64-row block.
struct RowFactors {
  float scale[2];
  float bias[2];
};

template <class C>
__device__ __forceinline__ RowFactors load_row_factors(const Params& p, int row) {
  RowFactors f{};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = min(row + 8 * i, p.n - 1);
    if (!C::kGrouped && p.out_dtype != FG_I32) f.scale[i] = __ldg(p.w_scale + r);
    if (p.bias != nullptr) {
      if (p.out_dtype == FG_F16) {
        f.bias[i] = __half2float(static_cast<const __half*>(p.bias)[r]);
      } else if (p.out_dtype == FG_BF16) {
        f.bias[i] = __bfloat162float(static_cast<const __nv_bfloat16*>(p.bias)[r]);
      } else {
        f.bias[i] = static_cast<const float*>(p.bias)[r];
      }
    }
  }
  return f;
}

// int4 weights carry a factor of 16 (they sit in the high nibble).
template <class C>
__device__ __forceinline__ int integer_result(int acc) {
  return C::kInt4 ? acc >> 4 : acc;
}

template <class C>
__device__ __forceinline__ float scaled_result(int acc, float x_scale, float w_scale, bool has_bias, float bias) {
  // Group scales: acc holds the bits of an fp32 sum that contains them.
  const float v = C::kGrouped ? __fmul_rn(__int_as_float(acc), x_scale)
                              : __fmul_rn(__fmul_rn(__int2float_rn(integer_result<C>(acc)), x_scale), w_scale);
  return has_bias ? __fadd_rn(v, bias) : v;
}

template <int kOut>
__device__ __forceinline__ uint32_t pack_16bit(float low, float high) {
  if constexpr (kOut == FG_F16) {
    const __half2 v = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  } else {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
}

template <class C>
__device__ __forceinline__ uint32_t word_32bit(bool raw, int acc, float x_scale, float w_scale, bool has_bias,
                                               float bias) {
  return raw ? static_cast<uint32_t>(integer_result<C>(acc))
             : __float_as_uint(scaled_result<C>(acc, x_scale, w_scale, has_bias, bias));
}

// kCount pieces (8 tokens x 16 rows per warp each) of one 64-row block straight to global memory.
// kOut: FG_F16, FG_BF16, or FG_F32 for the 32-bit types.  row, token: of the warp's first element; scales: x_scale of
// `token` in shared memory.
template <class C, int kOut, int kCount>
__device__ __forceinline__ void store_pieces_as(const Params& p, const int (&pieces)[kCount][4], const RowFactors& f,
                                                uint32_t scales, int row, int token) {
  constexpr bool kWide = kOut == FG_F32;
  const bool has_bias = p.bias != nullptr;
  const bool raw = p.out_dtype == FG_I32;
  const int lane = opaque(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  const int n = opaque(p.n);
  // 32 bits: a lane stores tokens 2t, 2t + 1 of rows g, g + 8.  16 bits: after a transpose, token g of rows
  // 2t, 2t + 1 and 2t + 8, 2t + 9.
  const int first_row = row + (kWide ? g : 2 * t), first_token = token + (kWide ? 2 * t : g);
  uint32_t* out = static_cast<uint32_t*>(p.out) +
                  (static_cast<int64_t>(first_token) * n + first_row) / (kWide ? 1 : 2);
  const int64_t stride = kWide ? n : n / 2;  // words from token to token
  const bool in_rows = row < n;                  // N is a multiple of 16: all 16 rows of a warp exist or none
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float2 xs = ptx::load_shared_float2(scales + (8 * i + 2 * t) * 4);
    if constexpr (kWide) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const uint32_t v =
            word_32bit<C>(raw, pieces[i][e], e % 2 ? xs.y : xs.x, f.scale[e / 2], has_bias, f.bias[e / 2]);
        if (in_rows && first_token + 8 * i + e % 2 < p.m) out[(8 * i + e % 2) * stride + 8 * (e / 2)] = v;
      }
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t v = ptx::transpose_matrix(
            pack_16bit<kOut>(scaled_result<C>(pieces[i][2 * h], xs.x, f.scale[h], has_bias, f.bias[h]),
                             scaled_result<C>(pieces[i][2 * h + 1], xs.y, f.scale[h], has_bias, f.bias[h])));
        if (in_rows && first_token + 8 * i < p.m) out[8 * i * stride + 4 * h] = v;
      }
    }
  }
}

template <class C, int kCount>
__device__ __forceinline__ void store_pieces(const Params& p, const int (&pieces)[kCount][4], const RowFactors& f,
                                             uint32_t scales, int row, int token) {
  if (p.out_dtype == FG_F16) store_pieces_as<C, FG_F16, kCount>(p, pieces, f, scales, row, token);
  else if (p.out_dtype == FG_BF16) store_pieces_as<C, FG_BF16, kCount>(p, pieces, f, scales, row, token);
  else store_pieces_as<C, FG_F32, kCount>(p, pieces, f, scales, row, token);
}

// The whole tile of a warpgroup through shared memory and tensor stores.  `staging` holds 2 * kStoreBytes.
template <class C, int kOut>
__device__ __forceinline__ void store_tensor(const Params& p, const CUtensorMap* out_map,
                                             const int (&acc)[C::kTokens / 2], const RowFactors& f, uint32_t scales,
                                             uint32_t staging, int block_row, int token, int group_barrier) {
  constexpr bool kWide = kOut == FG_F32;
  // The buffer of the first piece is then the one of the last piece of the tile before.
  constexpr bool kOddPieces = C::kTokens / C::kStoreTokens % 2 != 0;
  const bool has_bias = p.bias != nullptr;
  const bool raw = p.out_dtype == FG_I32;
  const int thread = opaque(threadIdx.x % 128), lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4;
  const bool leader = thread == 0;
#pragma unroll
  for (int c = 0; c < C::kTokens / C::kStoreTokens; ++c) {
    const int first_token = token + c * C::kStoreTokens;
    const uint32_t buffer = staging + (kWide ? 0 : c % 2 * C::kStoreBytes);
    if (leader) {
      if (kWide || (kOddPieces && c == 0)) ptx::bulk_wait_read<0>();
      else ptx::bulk_wait_read<1>();
    }
    ptx::named_barrier_sync(group_barrier, 128);
    // A token is 128 bytes of the buffer: chunk c of 16 bytes lies at c ^ (token % 8).
    const uint32_t scale = scales + (c * C::kStoreTokens + 2 * t) * 4;
#pragma unroll
    for (int j = 0; j < C::kStoreTokens / 8; j += 2) {
      uint32_t packed[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 xs = ptx::load_shared_float2(scale + 8 * (j + i) * 4);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int a = 4 * (c * (C::kStoreTokens / 8) + j + i) + 2 * h;
          const int a0 = acc[a], a1 = acc[a + 1];
          if constexpr (kWide) {
            // Rows 0..31 and 32..63 of the block go to the two halves of the buffer.
            const uint32_t half = buffer + warp / 2 * C::kStoreBytes + 8 * (j + i) * 128 + g % 4 * 4;
            const int chunk = 4 * (warp % 2) + 2 * h + g / 4;
            ptx::store_shared_4(half + 2 * t * 128 + (chunk ^ (2 * t)) * 16,
                                word_32bit<C>(raw, a0, xs.x, f.scale[h], has_bias, f.bias[h]));
            ptx::store_shared_4(half + (2 * t + 1) * 128 + (chunk ^ (2 * t + 1)) * 16,
                                word_32bit<C>(raw, a1, xs.y, f.scale[h], has_bias, f.bias[h]));
          } else {
            packed[2 * i + h] =
                pack_16bit<kOut>(scaled_result<C>(a0, xs.x, f.scale[h], has_bias, f.bias[h]),
                                 scaled_result<C>(a1, xs.y, f.scale[h], has_bias, f.bias[h]));
          }
        }
      }
      if constexpr (!kWide) {
        // Matrices: rows 0..7 and 8..15 of the warp for tokens 8j .., then for tokens 8j + 8 ..
        const int chunk = 2 * warp + lane / 8 % 2;
        const uint32_t address = buffer + (lane / 16 * 8 + lane % 8) * 128 + (chunk ^ (lane % 8)) * 16;
        ptx::store_matrix_x4_trans(address + 8 * j * 128, packed[0], packed[1], packed[2], packed[3]);
      }
    }
    ptx::fence_async_shared();
    ptx::named_barrier_sync(group_barrier, 128);
    if (leader) {
      if (first_token < p.m) {
        ptx::tensor_store(out_map, buffer, block_row, first_token);
        if constexpr (kWide) ptx::tensor_store(out_map, buffer + C::kStoreBytes, block_row + 32, first_token);
      }
      ptx::bulk_commit();
    }
  }
}

}  // namespace fg::sm90

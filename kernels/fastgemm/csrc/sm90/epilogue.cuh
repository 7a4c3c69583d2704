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
    if (p.out_dtype != FG_I32) f.scale[i] = __ldg(p.w_scale + r);
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
  const float v = __fmul_rn(__fmul_rn(__int2float_rn(integer_result<C>(acc)), x_scale), w_scale);
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

// One piece (8 tokens x 16 rows per warp) straight to global memory.  kOut: FG_F16, FG_BF16, or FG_F32 for 32-bit types.
template <class C, int kOut>
__device__ __forceinline__ void store_piece(const Params& p, const int* acc, const RowFactors& f, float2 xs, int row,
                                            int token, int lane) {
  const bool has_bias = p.bias != nullptr;
  const int g = lane / 4, t = lane % 4;
  if constexpr (kOut == FG_F32) {
    const bool raw = p.out_dtype == FG_I32;
    uint32_t* out = static_cast<uint32_t*>(p.out);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = row + g + 8 * (i / 2), m = token + 2 * t + i % 2;
      const uint32_t v = word_32bit<C>(raw, acc[i], i % 2 ? xs.y : xs.x, f.scale[i / 2], has_bias, f.bias[i / 2]);
      if (m < p.m && r < p.n) out[static_cast<int64_t>(m) * p.n + r] = v;
    }
  } else {
    uint16_t* out = static_cast<uint16_t*>(p.out);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // After the transpose a lane holds token g, rows 2t and 2t + 1.
      const uint32_t v = ptx::transpose_matrix(
          pack_16bit<kOut>(scaled_result<C>(acc[2 * i], xs.x, f.scale[i], has_bias, f.bias[i]),
                           scaled_result<C>(acc[2 * i + 1], xs.y, f.scale[i], has_bias, f.bias[i])));
      const int r = row + 8 * i + 2 * t, m = token + g;
      if (m < p.m && r < p.n) *reinterpret_cast<uint32_t*>(out + static_cast<int64_t>(m) * p.n + r) = v;
    }
  }
}

// Pieces [first, last) of the accumulators straight to global memory.
template <class C, int kOut>
__device__ __forceinline__ void store_direct(const Params& p, const int (&acc)[C::kBlocks][C::kTokens / 2],
                                             const RowFactors (&f)[C::kBlocks], uint32_t scales, int row, int token,
                                             int first, int last) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int q = 0; q < C::kPieces; ++q) {
    const int r = q / (C::kTokens / 8), j = q % (C::kTokens / 8);
    if (q >= first && q < last && token + 8 * j < p.m) {
      const float2 xs = ptx::load_shared_float2(scales + (8 * j + 2 * (lane % 4)) * 4);
      store_piece<C, kOut>(p, &acc[r][4 * j], f[r], xs, row + 64 * r, token + 8 * j, lane);
    }
  }
}

// The whole tile of a warpgroup through shared memory and tensor stores.  `staging` holds 2 * kStoreBytes.
template <class C, int kOut>
__device__ __forceinline__ void store_tensor(const Params& p, const CUtensorMap* out_map,
                                             const int (&acc)[C::kBlocks][C::kTokens / 2],
                                             const RowFactors (&f)[C::kBlocks], uint32_t scales, uint32_t staging,
                                             int block_row, int token, int group_barrier) {
  constexpr bool kWide = kOut == FG_F32;
  const bool has_bias = p.bias != nullptr;
  const bool raw = p.out_dtype == FG_I32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int g = lane / 4, t = lane % 4;
  const bool leader = threadIdx.x % 128 == 0;
#pragma unroll
  for (int r = 0; r < C::kBlocks; ++r) {
#pragma unroll
    for (int c = 0; c < C::kTokens / C::kStoreTokens; ++c) {
      const int first_token = token + c * C::kStoreTokens;
      const int piece = r * (C::kTokens / C::kStoreTokens) + c;
      const uint32_t buffer = staging + (kWide ? 0 : piece % 2 * C::kStoreBytes);
      if (leader) {
        if constexpr (kWide) ptx::bulk_wait_read<0>();
        else ptx::bulk_wait_read<1>();
      }
      ptx::named_barrier_sync(group_barrier, 128);
#pragma unroll
      for (int j = 0; j < C::kStoreTokens / 8; j += 2) {
        const int a = 4 * (c * (C::kStoreTokens / 8) + j);
        uint32_t packed[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 xs = ptx::load_shared_float2(scales + (c * C::kStoreTokens + 8 * (j + i) + 2 * t) * 4);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int a0 = acc[r][a + 4 * i + 2 * h], a1 = acc[r][a + 4 * i + 2 * h + 1];
            if constexpr (kWide) {
              // Rows 0..31 and 32..63 of the block go to the two halves of the buffer, 32 rows = 128 bytes a token.
              const int row = 16 * (warp % 2) + 8 * h + g, m = 8 * (j + i) + 2 * t;
              const uint32_t base = buffer + warp / 2 * C::kStoreBytes + row % 4 * 4;
              ptx::store_shared_4(base + m * 128 + ((row / 4) ^ (m % 8)) * 16,
                                  word_32bit<C>(raw, a0, xs.x, f[r].scale[h], has_bias, f[r].bias[h]));
              ptx::store_shared_4(base + (m + 1) * 128 + ((row / 4) ^ ((m + 1) % 8)) * 16,
                                  word_32bit<C>(raw, a1, xs.y, f[r].scale[h], has_bias, f[r].bias[h]));
            } else {
              packed[2 * i + h] =
                  pack_16bit<kOut>(scaled_result<C>(a0, xs.x, f[r].scale[h], has_bias, f[r].bias[h]),
                                   scaled_result<C>(a1, xs.y, f[r].scale[h], has_bias, f[r].bias[h]));
            }
          }
        }
        if constexpr (!kWide) {
          const int m = 8 * (j + lane / 16) + lane % 8;
          const uint32_t address = buffer + m * 128 + ((2 * warp + lane / 8 % 2) ^ (m % 8)) * 16;
          ptx::store_matrix_x4_trans(address, packed[0], packed[1], packed[2], packed[3]);
        }
      }
      ptx::fence_async_shared();
      ptx::named_barrier_sync(group_barrier, 128);
      if (leader) {
        if (first_token < p.m) {
          ptx::tensor_store(out_map, buffer, block_row + 64 * r, first_token);
          if constexpr (kWide) ptx::tensor_store(out_map, buffer + C::kStoreBytes, block_row + 64 * r + 32, first_token);
        }
        ptx::bulk_commit();
      }
    }
  }
}

}  // namespace fg::sm90

// Chooses the tile and the split of K for a problem, and launches.
#pragma once

#include <algorithm>
#include <atomic>

#include "../common/gemm_args.h"
#include "gemm.cuh"
#include "split_k.h"

namespace fg {
namespace sm80 {

inline int cuda_error(cudaError_t status) {
  return status == cudaSuccess ? FG_OK : FG_ERROR_CUDA + static_cast<int>(status);
}

// Multiprocessors of the current device; negative: -cudaError_t.
inline int multiprocessors() {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> cache[kMaxDevices];
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return -static_cast<int>(status);
  if (device < kMaxDevices) {
    const int known = cache[device].load(std::memory_order_relaxed);
    if (known != 0) return known;
  }
  int count = 0;
  status = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return -static_cast<int>(status);
  if (device < kMaxDevices) cache[device].store(count, std::memory_order_relaxed);
  return count;
}

// Tiles by the number of tokens: rows x tokens of a block, columns of K in a stage, stages, blocks per multiprocessor.
template <Weights W>
inline constexpr bool kIsPacked = W != Weights::kInt8;
template <Weights W>
using Tokens8 = Config<W, 4, 1, 1, 1, 2, kIsPacked<W> ? 6 : 4, kIsPacked<W> ? 5 : 4>;  // 64 x 8, 128 columns
template <Weights W>
using Tokens16 = Config<W, 4, 1, 1, 2, 2, kIsPacked<W> ? 6 : 4, 4>;  // 64 x 16, 128 columns
template <Weights W>
using Tokens32 = Config<W, 4, 1, 1, 4, 2, 4, 4>;  // 64 x 32, 128 columns
template <Weights W>
using Tokens64 = Config<W, 4, 1, 2, 8, 1, 4, W == Weights::kGrouped ? 2 : 3>;  // 128 x 64, 64 columns
template <Weights W>
using Tokens128 = Config<W, 2, 2, 4, 8, 1, kIsPacked<W> ? 4 : 3, 2>;  // 128 x 128, 64 columns
// Scales per group take a second set of accumulators: eight warps share the tile instead of four.
using Tokens128Grouped = Config<Weights::kGrouped, 4, 2, 2, 8, 1, 4, 1>;  // 128 x 128, 64 columns

struct Split {
  int steps, steps_per_split, splits;
};

// Splits K until the blocks fill the device, but leaves every block enough of K to amortize its start and end.
template <typename C>
Split choose_split(int64_t m, int64_t n, int64_t k, int sm_count) {
  constexpr int kMinSteps = 1024 / C::kColumns;
  constexpr int kMaxSplits = C::kTokens >= 128 ? 8 : 5;  // more cost more in partial sums than they gain
  const int steps = static_cast<int>((k + C::kColumns - 1) / C::kColumns);
  const int64_t blocks = ((n + C::kRows - 1) / C::kRows) * ((m + C::kTokens - 1) / C::kTokens);
  const int64_t room = static_cast<int64_t>(sm_count) * C::kBlocksPerSm / blocks;
  const int64_t wanted = std::min<int64_t>({room, steps / kMinSteps, kMaxSplits});
  const int splits = static_cast<int>(std::max<int64_t>(1, wanted));
  int per_split = (steps + splits - 1) / splits;
  if constexpr (C::kGrouped) {
    constexpr int kGroupSteps = (kGroupSize + C::kColumns - 1) / C::kColumns;
    per_split = (per_split + kGroupSteps - 1) / kGroupSteps * kGroupSteps;
  }
  return {steps, per_split, (steps + per_split - 1) / per_split};
}

template <typename C>
int64_t partial_bytes(int64_t m, int64_t n, int64_t k) {
  const int sm_count = multiprocessors();
  if (sm_count <= 0) return 0;
  const int splits = choose_split<C>(m, n, k, sm_count).splits;
  return splits > 1 ? splits * m * n * 4 : 0;
}

// The operands of the ablation kernels that GemmArgs has no place for.
struct Extra {
  const uint8_t* zero = nullptr;
  const float* group_scale = nullptr;
};

template <typename C>
int launch(const GemmArgs& args, const Extra& extra) {
  const int sm_count = multiprocessors();
  if (sm_count <= 0) return FG_ERROR_CUDA - sm_count;
  const Split split = choose_split<C>(args.m, args.n, args.k, sm_count);

  GemmParams p;
  p.x = args.x;
  p.w = static_cast<const uint8_t*>(args.w);
  p.zero = extra.zero;
  p.group_scale = extra.group_scale;
  p.partial = static_cast<int32_t*>(args.workspace);
  p.m = args.m, p.n = args.n, p.k = args.k;
  p.steps = split.steps;
  p.steps_per_split = split.steps_per_split;
  p.row_blocks = static_cast<int>((args.n + C::kRows - 1) / C::kRows);
  p.token_blocks = static_cast<int>((args.m + C::kTokens - 1) / C::kTokens);
  const int shift = C::kWeights == Weights::kInt4 ? 4 : 0;
  p.epilogue = {args.x_scale, args.w_scale, args.bias, args.out, args.n, args.out_dtype, shift, C::kGrouped};

  const int64_t blocks = static_cast<int64_t>(p.row_blocks) * p.token_blocks;
  if (blocks > INT32_MAX / kTokenBlocksPerGroup) return FG_ERROR_SIZE;
  cudaError_t status = cudaFuncSetAttribute(gemm<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes);
  if (status != cudaSuccess) return cuda_error(status);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(split.splits));
  gemm<C><<<grid, C::kThreads, C::kSharedBytes, args.stream>>>(p);
  status = cudaGetLastError();
  if (status != cudaSuccess || split.splits == 1) return cuda_error(status);

  return cuda_error(add_splits(p.partial, split.splits, args.m, p.epilogue, args.stream));
}

// Calls `use` with the tile for m tokens.
template <Weights W, typename Use>
auto with_tile(int64_t m, Use use) {
  if (m <= 8) return use(Tokens8<W>{});
  if (m <= 16) return use(Tokens16<W>{});
  if (m <= 32) return use(Tokens32<W>{});
  if (m <= 64) return use(Tokens64<W>{});
  if constexpr (W == Weights::kGrouped)
    return use(Tokens128Grouped{});
  else
    return use(Tokens128<W>{});
}

template <Weights W>
int run(const GemmArgs& args, const Extra& extra = {}) {
  return with_tile<W>(args.m, [&](auto tile) { return launch<decltype(tile)>(args, extra); });
}

template <Weights W>
int64_t workspace(int64_t m, int64_t n, int64_t k) {
  return with_tile<W>(m, [&](auto tile) { return partial_bytes<decltype(tile)>(m, n, k); });
}

}  // namespace sm80
}  // namespace fg

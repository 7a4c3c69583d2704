// int8 GEMM on mma.sync (sm_80, sm_86, sm_89; also runs on newer GPUs), weights packed int4 or plain int8.
//
// The weight's rows are the 16-row operand A of mma.m16n8k32 and the tokens its 8-column operand B, so few tokens
// waste little.  A block computes kRows weight rows x kTokens tokens; both operands travel through shared memory in
// kStages asynchronous stages of kTiles x 64 columns of K.  Packed weights are copied as they are: a thread reads its
// operand of a k = 64 step with one 16-byte load and separates the nibbles with three logic operations per word.
// The k range can be split over gridDim.y blocks, whose int32 partial sums a second kernel adds: integer sums do not
// depend on the order, so results are the same for every split.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "epilogue.cuh"
#include "ptx.cuh"

namespace fg {
namespace sm80 {

// What the weights are.  The first two are the products proper; the others measure what FastGEMM avoids.
enum class Weights {
  kInt8,        // int8 [N, K]
  kInt4,        // packed, symmetric per channel: multiplied as 16 times their value
  kAsymmetric,  // packed, unsigned with a zero point per channel, subtracted from every value before the product
  kGrouped,     // packed, symmetric with a scale for each kGroupSize columns: sums leave int32 after every group
};
constexpr int kGroupSize = 128;

struct GemmParams {
  const int8_t* x;  // [M, K]
  const uint8_t* w;  // packed W4 layout v1, or int8 [N, K]
  const uint8_t* zero;       // [N] in 0..15 (kAsymmetric)
  const float* group_scale;  // [K / kGroupSize, N] (kGrouped)
  int32_t* partial;  // [splits, M, N] raw sums when gridDim.y > 1
  int64_t m, n, k;
  int steps;            // k steps of kTiles * 64 columns
  int steps_per_split;  // of them per block
  int row_blocks, token_blocks;
  Epilogue epilogue;
};

// Token blocks that run side by side on one weight tile, so that it is read from the L2 cache.
constexpr int kTokenBlocksPerGroup = 8;
constexpr uint32_t kNibbles = 0xF0F0F0F0u;

template <Weights kWeights_, int kRowWarps_, int kTokenWarps_, int kRowTiles_, int kTokenTiles_, int kTiles_,
          int kStages_, int kBlocksPerSm_>
struct Config {
  static constexpr Weights kWeights = kWeights_;
  static constexpr bool kPacked = kWeights != Weights::kInt8;
  static constexpr bool kGrouped = kWeights == Weights::kGrouped;
  static constexpr int kRowWarps = kRowWarps_, kTokenWarps = kTokenWarps_;
  static constexpr int kRowTiles = kRowTiles_;      // 16-row tiles of a warp
  static constexpr int kTokenTiles = kTokenTiles_;  // 8-token tiles of a warp
  static constexpr int kTiles = kTiles_;            // 64-column tiles of a stage
  static constexpr int kStages = kStages_;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kThreads = 32 * kRowWarps * kTokenWarps;
  static constexpr int kRows = 16 * kRowWarps * kRowTiles;
  static constexpr int kWarpTokens = 8 * kTokenTiles;
  static constexpr int kTokens = kWarpTokens * kTokenWarps;
  static constexpr int kColumns = 64 * kTiles;
  static constexpr int kChunks = kColumns / 16;  // 16-byte pieces of a row of a stage
  static constexpr int kWeightBytes = kPacked ? kRows * kColumns / 2 : kRows * kColumns;
  static constexpr int kTokenBytes = kTokens * kColumns;
  static constexpr int kStageBytes = kWeightBytes + kTokenBytes;
  static constexpr int kWeightCopies = (kWeightBytes / 16 + kThreads - 1) / kThreads;
  static constexpr int kTokenCopies = (kTokenBytes / 16 + kThreads - 1) / kThreads;
  // The accumulators leave through shared memory, the tokens of one column of warps at a time.
  static constexpr int kOutputPitch = kRows + 4;
  static constexpr int kOutputBytes = kWarpTokens * kOutputPitch * 4;
  static constexpr int kSharedBytes =
      kStages * kStageBytes > kOutputBytes ? kStages * kStageBytes : kOutputBytes;
  static_assert(kRows % 64 == 0, "a block covers whole packed tiles");
  static_assert(kTiles == 1 || kTiles == 2, "row pitch of 64 or 128 bytes");
};

// Offset of a 16-byte piece in a tile of rows of kChunks pieces, such that the eight rows an ldmatrix reads at once lie
// in different banks.
template <int kChunks>
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  const int permutation = kChunks == 4 ? (row / 2) % 4 : row % 8;
  return static_cast<uint32_t>((row * kChunks + (chunk ^ permutation)) * 16);
}

// This thread's share of the copies of a stage.
template <typename C>
struct Copies {
  const uint8_t* weight[C::kWeightCopies];
  const int8_t* token[C::kTokenCopies];
  int weight_limit[C::kWeightCopies];  // columns of K from here on (for a packed piece: from its tile on)
  int token_limit[C::kTokenCopies];
  uint32_t weight_target[C::kWeightCopies];
  uint32_t token_target[C::kTokenCopies];

  __device__ __forceinline__ Copies(const GemmParams& p, int64_t first_row, int64_t first_token, int first_column) {
    const int k = static_cast<int>(p.k);
#pragma unroll
    for (int j = 0; j < C::kWeightCopies; ++j) {
      const int piece = threadIdx.x + j * C::kThreads;
      if constexpr (C::kPacked) {
        const int tile_row = piece / (C::kTiles * 128);
        const int tile = piece / 128 % C::kTiles;
        const int64_t row_tile = first_row / 64 + tile_row;
        const int64_t row_tiles = (p.n + 63) / 64, column_tiles = (p.k + 63) / 64;
        const int column = first_column + 64 * tile;
        const bool valid = piece < C::kWeightBytes / 16 && row_tile < row_tiles;
        weight_limit[j] = valid ? k - column : 0;
        weight[j] = p.w + (valid ? (row_tile * column_tiles + column / 64) * 2048 + piece % 128 * 16 : 0);
        weight_target[j] = piece * 16;
      } else {
        const int row = piece / C::kChunks, chunk = piece % C::kChunks;
        const int column = first_column + 16 * chunk;
        const bool valid = piece < C::kWeightBytes / 16 && first_row + row < p.n;
        weight_limit[j] = valid ? k - column : 0;
        weight[j] = p.w + (valid ? (first_row + row) * p.k + column : 0);
        weight_target[j] = swizzled<C::kChunks>(row, chunk);
      }
    }
#pragma unroll
    for (int j = 0; j < C::kTokenCopies; ++j) {
      const int piece = threadIdx.x + j * C::kThreads;
      const int row = piece / C::kChunks, chunk = piece % C::kChunks;
      const int column = first_column + 16 * chunk;
      const bool valid = piece < C::kTokenBytes / 16 && first_token + row < p.m;
      token_limit[j] = valid ? k - column : 0;
      token[j] = p.x + (valid ? (first_token + row) * p.k + column : 0);
      token_target[j] = C::kWeightBytes + swizzled<C::kChunks>(row, chunk);
    }
  }

  // Starts the copies of the next stage into `stage` and moves on along K.
  __device__ __forceinline__ void start(uint32_t stage) {
#pragma unroll
    for (int j = 0; j < C::kWeightCopies; ++j) {
      const bool mine = C::kWeightBytes / 16 % C::kThreads == 0 ||
                        threadIdx.x + j * C::kThreads < C::kWeightBytes / 16;
      if (mine) copy_async(stage + weight_target[j], weight[j], weight_limit[j] > 0);
      weight[j] += C::kPacked ? C::kTiles * 2048 : C::kColumns;
      weight_limit[j] -= C::kColumns;
    }
#pragma unroll
    for (int j = 0; j < C::kTokenCopies; ++j) {
      const bool mine = C::kTokenBytes / 16 % C::kThreads == 0 || threadIdx.x + j * C::kThreads < C::kTokenBytes / 16;
      if (mine) copy_async(stage + token_target[j], token[j], token_limit[j] > 0);
      token[j] += C::kColumns;
      token_limit[j] -= C::kColumns;
    }
  }
};

// Four int8 values per word from four weights in the high (kHigh) or low nibbles of a packed word.
template <Weights kWeights, bool kHigh>
__device__ __forceinline__ uint32_t operand(uint32_t packed, uint32_t zeros) {
  if constexpr (kWeights == Weights::kAsymmetric)
    return __vsub4((kHigh ? packed >> 4 : packed) & ~kNibbles, zeros);
  else
    return (kHigh ? packed : packed << 4) & kNibbles;
}

// Zero points of the two rows of a 16-row tile that this thread holds, four times each.
template <typename C>
struct ZeroPoints {
  uint32_t value[C::kRowTiles][2] = {};

  __device__ __forceinline__ ZeroPoints(const GemmParams& p, int64_t first_row, int row_warp) {
    if constexpr (C::kWeights == Weights::kAsymmetric) {
#pragma unroll
      for (int r = 0; r < C::kRowTiles; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t row = first_row + 16 * (row_warp * C::kRowTiles + r) + threadIdx.x % 32 / 4 + 8 * half;
          value[r][half] = row < p.n ? p.zero[row] * 0x01010101u : 0;
        }
    }
  }
};

// Ends a group: adds its sums, scaled, to `total`, and starts from 0 again.
template <typename C>
__device__ __forceinline__ void finish_group(float (&total)[C::kRowTiles][C::kTokenTiles][4],
                                             int32_t (&acc)[C::kRowTiles][C::kTokenTiles][4], const GemmParams& p,
                                             int64_t first_row, int row_warp, int group) {
#pragma unroll
  for (int r = 0; r < C::kRowTiles; ++r) {
    float scale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first_row + 16 * (row_warp * C::kRowTiles + r) + threadIdx.x % 32 / 4 + 8 * half;
      scale[half] = row < p.n ? p.group_scale[group * p.n + row] * 0.0625f : 0.0f;  // the weights count 16-fold
    }
#pragma unroll
    for (int t = 0; t < C::kTokenTiles; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        total[r][t][i] = fmaf(__int2float_rn(acc[r][t][i]), scale[i / 2], total[r][t][i]);
        acc[r][t][i] = 0;
      }
  }
}

// Accumulates one stage into acc.
template <typename C>
__device__ __forceinline__ void multiply_stage(int32_t (&acc)[C::kRowTiles][C::kTokenTiles][4], uint32_t stage,
                                               int row_warp, int token_warp, const ZeroPoints<C>& zeros) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int tile = 0; tile < C::kTiles; ++tile) {
    uint32_t a[C::kRowTiles][2][4];  // of the two k = 32 steps
#pragma unroll
    for (int r = 0; r < C::kRowTiles; ++r) {
      const int row_tile = row_warp * C::kRowTiles + r;  // of 16 rows
      if constexpr (C::kPacked) {
        uint32_t packed[4];
        load_shared(packed, stage + ((row_tile / 4 * C::kTiles + tile) * 2048 + row_tile % 4 * 512 + lane * 16));
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          a[r][word / 2][word % 2 * 2] = operand<C::kWeights, true>(packed[word], zeros.value[r][0]);
          a[r][word / 2][word % 2 * 2 + 1] = operand<C::kWeights, false>(packed[word], zeros.value[r][1]);
        }
      } else {
#pragma unroll
        for (int step = 0; step < 2; ++step)
          load_matrices(a[r][step],
                        stage + swizzled<C::kChunks>(16 * row_tile + lane % 16, 4 * tile + 2 * step + lane / 16));
      }
    }
#pragma unroll
    for (int t = 0; t < C::kTokenTiles; ++t) {
      uint32_t b[4];
      const int row = token_warp * C::kWarpTokens + 8 * t + lane % 8;
      load_matrices(b, stage + C::kWeightBytes + swizzled<C::kChunks>(row, 4 * tile + lane / 8));
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int r = 0; r < C::kRowTiles; ++r)
          multiply_add(acc[r][t], a[r][step], b[2 * step], b[2 * step + 1]);
    }
  }
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm) gemm(const GemmParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row_warp = warp % C::kRowWarps, token_warp = warp / C::kRowWarps;

  const int group = blockIdx.x / (kTokenBlocksPerGroup * p.row_blocks);
  const int group_begin = group * kTokenBlocksPerGroup;
  const int group_size = min(kTokenBlocksPerGroup, p.token_blocks - group_begin);
  const int in_group = blockIdx.x - group_begin * p.row_blocks;
  const int64_t first_row = static_cast<int64_t>(in_group / group_size) * C::kRows;
  const int64_t first_token = static_cast<int64_t>(group_begin + in_group % group_size) * C::kTokens;

  const int first_step = blockIdx.y * p.steps_per_split;
  const int steps = min(p.steps_per_split, p.steps - first_step);
  Copies<C> copies(p, first_row, first_token, first_step * C::kColumns);

  const ZeroPoints<C> zeros(p, first_row, row_warp);

  int32_t acc[C::kRowTiles][C::kTokenTiles][4] = {};
  float total[C::kGrouped ? C::kRowTiles : 1][C::kGrouped ? C::kTokenTiles : 1][4] = {};
#pragma unroll
  for (int s = 0; s < C::kStages - 1; ++s) {
    if (s < steps) copies.start(base + s * C::kStageBytes);
    commit_copies();
  }
  int read = 0, write = C::kStages - 1;
  for (int step = 0; step < steps; ++step) {
    wait_copies<C::kStages - 2>();
    __syncthreads();  // the stage has arrived for all threads, and all are done with the one that is filled next
    if (step + C::kStages - 1 < steps) copies.start(base + write * C::kStageBytes);
    commit_copies();
    multiply_stage<C>(acc, base + read * C::kStageBytes, row_warp, token_warp, zeros);
    if constexpr (C::kGrouped) {
      const int end = (first_step + step + 1) * C::kColumns;
      if (end % kGroupSize == 0) finish_group<C>(total, acc, p, first_row, row_warp, end / kGroupSize - 1);
    }
    read = read + 1 == C::kStages ? 0 : read + 1;
    write = write + 1 == C::kStages ? 0 : write + 1;
  }
  wait_copies<0>();

  Epilogue epilogue = p.epilogue;
  if (gridDim.y > 1) {
    epilogue.out = p.partial + static_cast<int64_t>(blockIdx.y) * p.m * p.n;
    epilogue.out_dtype = FG_I32;  // also for the bits of fp32 sums
    epilogue.float_sums = false;
    epilogue.shift = 0;
  }
  int32_t* staged = reinterpret_cast<int32_t*>(shared);
#pragma unroll
  for (int part = 0; part < C::kTokenWarps; ++part) {
    __syncthreads();
    if (token_warp == part) {
#pragma unroll
      for (int r = 0; r < C::kRowTiles; ++r)
#pragma unroll
        for (int t = 0; t < C::kTokenTiles; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = 16 * (row_warp * C::kRowTiles + r) + lane / 4 + 8 * (i / 2);
            const int token = 8 * t + 2 * (lane % 4) + i % 2;
            if constexpr (C::kGrouped)
              staged[token * C::kOutputPitch + row] = __float_as_int(total[r][t][i]);
            else
              staged[token * C::kOutputPitch + row] = acc[r][t][i];
          }
    }
    __syncthreads();
    constexpr int kPieces = C::kRows / 8;
    for (int piece = threadIdx.x; piece < C::kWarpTokens * kPieces; piece += C::kThreads) {
      const int token = piece / kPieces, row = piece % kPieces * 8;
      const int64_t m = first_token + part * C::kWarpTokens + token, n = first_row + row;
      if (m >= p.m || n >= p.n) continue;
      const int4* source = reinterpret_cast<const int4*>(staged + token * C::kOutputPitch + row);
      const int4 low = source[0], high = source[1];
      int32_t values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      store8(epilogue, m, n, values);
    }
  }
}

}  // namespace sm80
}  // namespace fg

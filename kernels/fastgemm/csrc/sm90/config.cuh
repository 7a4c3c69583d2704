// Compile-time shape of one sm_90a GEMM kernel, its shared-memory layout and its launch parameters.
//
// The weights are operand A of wgmma (64 rows each), the tokens operand B.  One CTA computes a tile of
// kRows weight rows x kTokens tokens with one or two consumer warpgroups of 64 rows each.
#pragma once

#include <stdint.h>

#include "plan.h"

namespace fg::sm90 {

constexpr int kBoxK = 128;              // reduction elements of a tensor copy: 128 bytes, the width of the swizzle
constexpr int kPackedTile = 2048;       // bytes of a packed 64 x 64 int4 tile
constexpr int kMaxStages = 20;
constexpr int kGroupSize = 128;         // reduction elements that share a weight scale (GroupedConfig)
constexpr int kSharedLimit = 232448;    // bytes of shared memory a block may use on sm_90

template <bool kInt4_, int kWarpgroups_, int kTokens_, int kStepK_>
struct Config {
  static constexpr bool kInt4 = kInt4_;  // int4 weights from registers, otherwise int8 weights from shared memory
  static constexpr int kWarpgroups = kWarpgroups_;  // consumer warpgroups, each owns a block of 64 rows
  static constexpr int kTokens = kTokens_;          // wgmma n
  static constexpr int kStepK = kStepK_;            // reduction elements per pipeline stage
  static constexpr int kConsumerWarps = 4 * kWarpgroups;
  static constexpr int kConsumerThreads = 32 * kConsumerWarps;
  static constexpr int kThreads = kConsumerThreads + 128;
  static constexpr int kRows = 64 * kWarpgroups;

  static constexpr int kTokenBytes = kTokens * kStepK;
  static constexpr int kWeightBytes = kInt4 ? kRows * kStepK / 2 : kRows * kStepK;
  static constexpr int kStageBytes = kTokenBytes + kWeightBytes;

  // What GroupedConfig and ZeroPointConfig change.
  static constexpr bool kGrouped = false;
  static constexpr bool kZeroPoint = false;
  static constexpr int kScaleBytes = 0;  // of weight scales that come with a stage

  // Whether the two CTAs of a cluster can load an operand that both multiply once.  int4 weights: not worth it.
  static constexpr bool kShares = kTokens >= 64;
  static constexpr bool kSharesWeights = kShares && !kInt4;

  // Few tokens, always one tile of them: weights and tokens of a stage arrive at barriers of their own, so that the loads
  // of weights that run ahead of the preceding kernel can be kept to kAheadStages in flight.
  static constexpr bool kFewTokens = kTokens <= 32;
  static constexpr int kAheadStages = 49152 / kWeightBytes;

  // Of weights that a CTA brings into L2 while the preceding kernel runs.  With many tokens the weights are a smaller
  // part of what it loads, and the prefetches delay the first stages.
  static constexpr int kPrefetchBytes = kTokens < 64 ? 131072 : 32768;

  // Output tiles leave through shared memory and tensor stores, in pieces of 64 rows x kStoreTokens tokens.
  static constexpr bool kTensorStore = kTokens >= 32;
  static constexpr int kStoreTokens = kTokens <= 64 ? kTokens : (kTokens % 64 == 0 ? 64 : 48);
  static constexpr int kStoreBytes = kStoreTokens * 128;  // 64 rows of 16 bits or 32 rows of 32 bits

  // Split-K: each thread's accumulators are cut into pieces of 8 tokens x (row g, row g + 8) = 4 registers.
  static constexpr int kPieces = kTokens / 8;
  static constexpr bool kThirds = kPieces <= 4;  // clusters of three exist: their shares are whole pieces
  static constexpr bool kOnePieceShares = kPieces <= 2;  // no CTA owns more than one piece
};

// int4 weights with a scale for each kGroupSize columns, multiplied with the int32 sum of the group.  The fp32 sums take
// a set of registers of their own.  So that the int32 sums fit beside them they are those of kSlice tokens at a time,
// twice: one set is scaled while the tensor cores fill the other.
template <int kWarpgroups_, int kTokens_, int kStepK_>
struct GroupedConfig : Config<true, kWarpgroups_, kTokens_, kStepK_> {
  using Base = Config<true, kWarpgroups_, kTokens_, kStepK_>;
  static constexpr bool kGrouped = true;
  static constexpr int kGroups = kStepK_ / kGroupSize;  // of a stage
  static constexpr int kSlice = kTokens_ <= 96 ? kTokens_ : (kTokens_ == 256 ? 32 : 64);
  static constexpr int kSlices = kTokens_ / kSlice;
  static constexpr int kScaleBytes = kGroups * Base::kRows * 4;
  // Pairs of CTAs: W4A8 gains at most 2 % from them.
  static constexpr bool kShares = false;
  static constexpr bool kSharesWeights = false;
  static_assert(kStepK_ % kGroupSize == 0 && kTokens_ % kSlice == 0, "");
};

// Unsigned int4 weights u with a zero point z per channel.  With bit 3 flipped the nibbles are u - 8 and sum_k x (u - z) is
// the sum over them minus (z - 8) sum_k x: the main loop stays as it is, and one multiply-add per accumulator corrects
// the sums at the end.
template <int kWarpgroups_, int kTokens_, int kStepK_>
struct ZeroPointConfig : Config<true, kWarpgroups_, kTokens_, kStepK_> {
  static constexpr bool kZeroPoint = true;
};

// Pieces whose sum over the cluster one CTA computes and stores.
template <class C>
__host__ __device__ constexpr int pieces_per_owner(int split) {
  return (C::kPieces + split - 1) / split;
}

// Bytes of partial sums that CTA `rank` gets from the other CTAs of its cluster.
template <class C>
__host__ __device__ constexpr int receive_bytes(int split, int rank) {
  const int share = pieces_per_owner<C>(split);
  const int left = C::kPieces - rank * share;
  return (split - 1) * (left < 0 ? 0 : (left < share ? left : share)) * C::kConsumerThreads * 16;
}

// CTAs that CTA `rank` sends partial sums to.  Only they report when their exchange area is free again: a report then
// never runs ahead of the sums it answers, so the phases of the barrier that counts the reports cannot mix.
template <class C>
__host__ __device__ constexpr int receivers(int split, int rank) {
  const int share = pieces_per_owner<C>(split);
  const int owners = (C::kPieces + share - 1) / share;
  return owners - (rank < owners ? 1 : 0);
}

struct SharedLayout {
  int exchange, scales, barriers, weight_scales, total;
};

// Offsets in bytes from the 1024-byte aligned start of shared memory, where the pipeline stages lie.  The exchange
// area holds output tiles on their way to tensor stores, later the partial sums of the other CTAs of the cluster.
template <class C>
__host__ __device__ constexpr SharedLayout shared_layout(int stages, int split, bool tensor_store) {
  const int staging = tensor_store ? C::kWarpgroups * 2 * C::kStoreBytes : 0;
  const int receive = (split - 1) * pieces_per_owner<C>(split) * C::kConsumerThreads * 16;
  SharedLayout l{};
  l.exchange = stages * C::kStageBytes;
  l.scales = l.exchange + (staging > receive ? staging : receive);
  l.barriers = l.scales + (C::kZeroPoint ? 2 : 1) * C::kWarpgroups * C::kTokens * 4;
  l.weight_scales = l.barriers + ((C::kFewTokens ? 3 : 2) * kMaxStages + 2) * 8;
  l.total = l.weight_scales + stages * C::kScaleBytes + 1024;
  return l;
}

template <class C>
constexpr int pipeline_stages(int split, bool tensor_store) {
  const int available = kSharedLimit - shared_layout<C>(0, split, tensor_store).total;
  const int stages = available / (C::kStageBytes + C::kScaleBytes);
  return stages < kMaxStages ? stages : kMaxStages;
}

struct Params {
  const float* x_scale;
  const float* w_scale;  // [N], or [groups, N] with GroupedConfig
  const void* bias;
  void* out;
  int m, n;
  int k_blocks;          // packed tiles along K
  int k_steps;           // pipeline steps along K
  int row_blocks;        // 64-row blocks of the weights
  Share share;           // if not kShareNothing, split is 1 and clusters have two CTAs
  int row_units;         // row tiles, or pairs of them with kShareTokens
  int token_units;       // token tiles, or pairs of them with kShareWeights
  int group;             // token units that are walked before the next row unit
  int tiles;             // of all units
  int whole_tiles;       // tiles before this index are computed by one CTA each, the rest by a cluster each
  int split;             // CTAs that share the reduction of a tile
  int share_steps[9];    // the steps of CTA r of a cluster are share_steps[r] .. share_steps[r + 1] - 1
  int clusters;          // of the grid
  int stages;
  int out_dtype;
  int stream_weights;    // weights pass by once: do not keep them in L2
  int ahead_steps;       // steps whose weights are requested while the preceding kernel may still run
  int weights_ready;     // the preceding kernel does not write the weights: load them before it has finished
  const uint8_t* zero;   // [N] in 0..15 (ZeroPointConfig)
  const int* x_sum;      // [M], sum of a token's values (ZeroPointConfig)
};

}  // namespace fg::sm90

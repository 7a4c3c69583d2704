// Compile-time shape of one sm_90a GEMM kernel, its shared-memory layout and its launch parameters.
//
// The weights are operand A of wgmma (64 rows each), the tokens operand B.  One CTA computes a tile of
// kRows weight rows x kTokens tokens with two consumer warpgroups; warpgroup g owns the row blocks g*kBlocks .. +kBlocks.
#pragma once

#include <stdint.h>

namespace fg::sm90 {

constexpr int kStepK = 128;             // reduction elements per pipeline stage
constexpr int kPackedTile = 2048;       // bytes of a packed 64 x 64 int4 tile
constexpr int kConsumerGroups = 2;
constexpr int kConsumerThreads = 128 * kConsumerGroups;
constexpr int kThreads = kConsumerThreads + 128;
constexpr int kConsumerWarps = kConsumerThreads / 32;
constexpr int kMaxStages = 16;
constexpr int kSharedLimit = 232448;    // bytes of shared memory a block may use on sm_90

template <bool kInt4_, int kBlocks_, int kTokens_, bool kMulticast_>
struct Config {
  static constexpr bool kInt4 = kInt4_;            // int4 weights from registers, otherwise int8 weights from shared memory
  static constexpr int kBlocks = kBlocks_;         // 64-row blocks per consumer warpgroup
  static constexpr int kTokens = kTokens_;         // wgmma n
  static constexpr bool kMulticast = kMulticast_;  // pairs of CTAs share the token tile
  static constexpr int kRowBlocks = kConsumerGroups * kBlocks;
  static constexpr int kRows = 64 * kRowBlocks;

  static constexpr int kTokenBytes = kTokens * kStepK;
  static constexpr int kWeightBytes = kInt4 ? kRows * kStepK / 2 : kRows * kStepK;
  static constexpr int kStageBytes = kTokenBytes + kWeightBytes;

  // Output tiles leave through shared memory and tensor stores, in pieces of 64 rows x kStoreTokens tokens.
  static constexpr bool kTensorStore = kTokens >= 32;
  static constexpr int kStoreTokens = kTokens <= 64 ? kTokens : (kTokens % 64 == 0 ? 64 : 48);
  static constexpr int kStoreBytes = kStoreTokens * 128;  // 64 rows of 16 bits or 32 rows of 32 bits

  // Split-K: each thread's accumulators are cut into pieces of 8 tokens x (row g, row g + 8) = 4 registers.
  static constexpr int kPieces = kBlocks * kTokens / 8;
};

struct SharedLayout {
  int staging, receive, scales, barriers, total;
};

// Offsets in bytes from the 1024-byte aligned start of shared memory, where the pipeline stages lie.
template <class C>
__host__ __device__ constexpr SharedLayout shared_layout(int stages, int split) {
  SharedLayout l{};
  l.staging = stages * C::kStageBytes;
  l.receive = l.staging + (C::kTensorStore && split == 1 ? kConsumerGroups * 2 * C::kStoreBytes : 0);
  l.scales = l.receive + (split > 1 ? (split - 1) * ((C::kPieces + split - 1) / split) * kConsumerThreads * 16 : 0);
  l.barriers = l.scales + kConsumerGroups * C::kTokens * 4;
  l.total = l.barriers + (2 * kMaxStages + 2) * 8 + 1024;
  return l;
}

template <class C>
constexpr int pipeline_stages(int split) {
  const int available = kSharedLimit - shared_layout<C>(0, split).total;
  const int stages = available / C::kStageBytes;
  return stages < kMaxStages ? stages : kMaxStages;
}

struct Params {
  const uint8_t* w;      // packed int4 tiles (unused for int8)
  const float* x_scale;
  const float* w_scale;
  const void* bias;
  void* out;
  int m, n;
  int k_blocks;          // packed tiles along K
  int k_steps;           // pipeline steps along K
  int row_blocks;        // 64-row blocks of the weights
  int row_tiles;         // row tiles (multicast: pairs of row tiles)
  int token_tiles;
  int group;             // token tiles that are walked before the next row tile
  int split;             // CTAs of a cluster that share a tile's reduction
  int stages;
  int out_dtype;
  int stream_weights;    // weights are read once: do not keep them in L2
};

}  // namespace fg::sm90

#include "plan.h"

#include <cmath>

#include "../common/gemm_args.h"

namespace fg::sm90 {
namespace {

struct Shape {
  int warpgroups, tokens;
};

// Must match the instances of instances.cuh.
constexpr Shape kShapes[] = {{2, 8},  {2, 16},  {2, 32},  {1, 64},  {2, 64},
                             {2, 96}, {1, 128}, {2, 128}, {2, 192}, {2, 256}};

constexpr int kMaxThirdsTokens = 32;  // Config::kThirds
constexpr int kMinShareTokens = 64;   // Config::kShares; Config::kSharesWeights: W8A8 alone

// Constants of the time estimate, fitted to measured times of all plans on an H100 SXM (docs/fastgemm.md).
constexpr double kCyclesPerUs = 2095;            // multiprocessor clock
constexpr double kSharedBytesPerCycle = 114;     // shared memory of one multiprocessor, reads and writes
constexpr double kOperandBytesPerUs = 85300;     // operands into one multiprocessor, weights found in L2
constexpr double kStreamBytesPerUs = 25600;      // weights into one multiprocessor from device memory
constexpr double kDeviceBytesPerUs = 3.3e6;      // weights from device memory, whole device
constexpr double kAheadBytes = 200000;           // of weights that a CTA loads before the preceding kernel is finished
constexpr double kOutsideBytesPerUs = 83200;     // rows of zeros in place of tokens that do not exist
constexpr double kTileUs = 0.60;                 // start and end of a tile
constexpr double kEpilogueUs = 0.0084;           // per 128 rows and token of a tile
constexpr double kReduceUs = 0.50;               // per doubling of the cluster
constexpr double kExchangeUs = 0.03;             // per 128 rows and token that is exchanged
constexpr double kPairUs = 1.9;                  // start and end of a pair of CTAs
// kW4A8Grouped: a conversion, issued every second cycle, and a multiply-add for each accumulator.
constexpr double kScaleCycles = 1.0;     // per warpgroup and token of a step
constexpr double kGroupScaleBytes = 4;   // of 128 weights

int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Clusters of `size` CTAs that can be counted on to be resident at once: the larger ones do not fill every processing
// cluster, and those of three find room late between the CTAs of the preceding kernel.
int resident_clusters(int sms, int size) {
  if (size <= 2) return sms / size;
  return size == 3 ? sms * 35 / 132 : sms * 30 / 33 / size;
}

double weight_bytes_per_value(int kind) {
  if (kind == FG_W8A8) return 1;
  return kind == kW4A8Grouped ? 0.5 + kGroupScaleBytes / 128 : 0.5;
}

// Of two things that overlap, but not perfectly.
double smooth_maximum(double a, double b) { return std::sqrt(std::sqrt(a * a * a * a + b * b * b * b)); }

// Time of 128 columns of a tile: tensor cores, shared memory, operands from L2, weights from device memory, and rows
// outside the matrix, which take the copy engine longer than real ones.
double step_us(int kind, int64_t m, Shape shape, Share share) {
  const int token_tiles = ceil_div(m, shape.tokens);
  const bool int4 = kind != FG_W8A8, grouped = kind == kW4A8Grouped;
  const double w = shape.warpgroups, t = shape.tokens;
  const double weight_bytes = (int4 ? 4096 : 8192) * w + (grouped ? 64 * kGroupScaleBytes * w : 0);
  const double token_bytes = 128 * t;
  const double scaling = grouped ? kScaleCycles * w * t / kCyclesPerUs : 0;  // while the tensor cores run
  const double tensor = smooth_maximum(4 * w * std::fmax(t / 2, 16) / kCyclesPerUs, scaling);
  // Each warpgroup reads all tokens; wgmma reads int8 weights from shared memory, too.
  const double shared = (2 * weight_bytes + token_bytes * (w + 1)) / (kSharedBytesPerCycle * kCyclesPerUs);
  const double own_weights = share == kShareWeights ? weight_bytes / 2 : weight_bytes;
  const double own_tokens = share == kShareTokens ? token_bytes / 2 : token_bytes;
  const double operands = (own_weights + own_tokens) / kOperandBytesPerUs;
  // The CTAs of other token tiles bring the same weights into L2.
  const double stream = own_weights / std::sqrt(std::fmin(token_tiles, 16)) / kStreamBytesPerUs;
  const int loaded_tiles = share == kShareWeights ? (token_tiles + 1) / 2 * 2 : token_tiles;
  const double outside = (static_cast<int64_t>(loaded_tiles) * shape.tokens - m) * own_tokens / t;
  return smooth_maximum(smooth_maximum(tensor, shared), smooth_maximum(operands, stream)) +
         outside / std::sqrt(loaded_tiles) / kOutsideBytesPerUs;
}

double estimate_us(int kind, int64_t m, int64_t n, int64_t k, bool weights_ready, int sms, Shape shape, int split,
                   Share share, double step) {
  const int row_tiles = ceil_div(n, 64 * shape.warpgroups), token_tiles = ceil_div(m, shape.tokens);
  const int pair = share == kShareNothing ? 1 : 2, cluster = share == kShareNothing ? split : 2;
  const int64_t tiles = static_cast<int64_t>(share == kShareTokens ? ceil_div(row_tiles, 2) : row_tiles) *
                        (share == kShareWeights ? ceil_div(token_tiles, 2) : token_tiles) * pair;
  const int64_t clusters = resident_clusters(sms, cluster), wave = clusters * cluster;
  const int64_t whole = split == 1 ? tiles : tiles / wave * wave;
  const int64_t rounds = ceil_div(whole, wave), shared_rounds = ceil_div(tiles - whole, clusters);

  const double steps_us = ceil_div(k, 128) * step;
  const double area = shape.warpgroups * shape.tokens / 2.0;
  double us = rounds * (steps_us + kEpilogueUs * area + kTileUs);
  // Multiprocessors without a tile in the last round load the weights of the next kernel meanwhile.
  const int64_t idle = rounds * wave - whole;
  if (weights_ready && m <= 16 && split == 1 && rounds > 1)
    us -= std::fmin(steps_us * idle / wave, idle * kAheadBytes / kDeviceBytesPerUs);
  if (shared_rounds > 0)
    us += shared_rounds * ((steps_us + kEpilogueUs * area) / split + kTileUs + kReduceUs * std::log2(split) +
                           kExchangeUs * area * (split - 1) / split);
  if (share != kShareNothing) us += kPairUs;
  return smooth_maximum(us, static_cast<double>(n) * k * weight_bytes_per_value(kind) / kDeviceBytesPerUs);
}

}  // namespace

Plan choose_plan(int kind, int64_t m, int64_t n, int64_t k, bool weights_ready, int sms) {
  // Few tokens: the narrowest tile that holds them all; up to 96: one that holds them all; more: few enough tiles.
  int narrow = 8;
  while (narrow < m && narrow < 64) narrow *= 2;
  const int least = m <= 96 ? 96 : m <= 192 ? 64 : m <= 384 ? 96 : 128;
  const int steps = ceil_div(k, 128);
  Plan best{};
  double best_us = INFINITY;
  for (const Shape shape : kShapes) {
    if (m <= 64 ? shape.tokens != narrow : shape.tokens < least) continue;
    for (const Share share : {kShareNothing, kShareTokens, kShareWeights}) {
      if (share != kShareNothing && (shape.tokens < kMinShareTokens || kind == kW4A8Grouped)) continue;
      if (share == kShareWeights && (kind == FG_W4A8 || m <= shape.tokens)) continue;
      const double step = step_us(kind, m, shape, share);
      for (const int split : {1, 2, 3, 4, 8}) {
        if (split > 1 && (share != kShareNothing || steps < 2 * split)) break;
        if (split == 3 && shape.tokens > kMaxThirdsTokens) continue;
        const double us = estimate_us(kind, m, n, k, weights_ready, sms, shape, split, share, step);
        if (us >= best_us) continue;
        best_us = us;
        best = Plan{shape.warpgroups, shape.tokens, split, share, shape.tokens == 256 ? 8 : 16};
      }
    }
  }
  return best;
}

bool is_plan(const Plan& plan, int64_t m) {
  for (const Shape shape : kShapes) {
    if (shape.warpgroups != plan.warpgroups || shape.tokens != plan.tokens) continue;
    if (shape.tokens <= kMaxThirdsTokens && m > shape.tokens) return false;  // Config::kFewTokens: one token tile
    if (plan.split == 3) return shape.tokens <= kMaxThirdsTokens;
    return plan.split == 1 || plan.split == 2 || plan.split == 4 || plan.split == 8;
  }
  return false;
}

// Split reductions go through distributed shared memory.
int64_t workspace_bytes(int, int64_t, int64_t, int64_t) { return 0; }

}  // namespace fg::sm90

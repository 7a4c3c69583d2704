#include "plan.h"

#include <cmath>

#include "../common/gemm_args.h"

namespace fg::sm90 {
namespace {

struct Shape {
  int blocks, tokens;
};

// Must match the instances of instances.cuh; two blocks exist for int4 alone.
constexpr Shape kShapes[] = {{1, 8}, {1, 16}, {1, 32}, {1, 64}, {1, 96}, {1, 128}, {2, 128}, {1, 192}, {1, 256}};

constexpr int kMaxThirdsTokens = 32;  // Config::kThirds

// Constants of the time estimate, fitted to measured times of all plans on an H100 SXM (docs/fastgemm.md).
constexpr double kCyclesPerUs = 1690;         // multiprocessor clock
constexpr double kSharedBytesPerUs = 70500;   // operands into one multiprocessor, weights found in L2
constexpr double kStreamBytesPerUs = 25600;   // weights into one multiprocessor from device memory
constexpr double kDeviceBytesPerUs = 3.3e6;   // weights from device memory, whole device
constexpr double kAheadBytes = 200000;        // of weights that a CTA loads before the preceding kernel is finished
constexpr double kEpilogueUs = 0.0174;        // per 64-row block of a warpgroup and token of a tile
constexpr double kReduceUs = 0.4;             // per doubling of the cluster
constexpr double kExchangeUs = 0.05;          // per 64-row block and token that is exchanged
constexpr double kNarrowInt4 = 1.02;          // tensor core time with fewer than 256 tokens, relative
constexpr double kNarrowInt8 = 1.26;

int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Clusters of `split` CTAs that can be counted on to be resident at once: the larger ones do not fill every processing
// cluster, and those of three find room late between the CTAs of the preceding kernel.
int resident_clusters(int sms, int split) {
  if (split <= 2) return sms / split;
  return split == 3 ? sms * 35 / 132 : sms * 30 / 33 / split;
}

double estimate_us(int kind, int64_t m, int64_t n, int64_t k, bool weights_ready, int sms, Shape shape, int split) {
  const int steps = ceil_div(k, 128);
  const int64_t tiles = static_cast<int64_t>(ceil_div(n, 128 * shape.blocks)) * ceil_div(m, shape.tokens);
  const int64_t clusters = resident_clusters(sms, split), wave = clusters * split;
  const int64_t whole = split == 1 ? tiles : tiles / wave * wave;
  const int64_t rounds = ceil_div(whole, wave), shared_rounds = ceil_div(tiles - whole, clusters);

  const double weight_bytes = (kind == FG_W4A8 ? 8192.0 : 16384.0) * shape.blocks;
  double tensor_us = 8.0 * shape.blocks * std::fmax(shape.tokens / 2, 16) / kCyclesPerUs;
  if (shape.tokens < 256) tensor_us *= kind == FG_W4A8 ? kNarrowInt4 : kNarrowInt8;
  const double load_us =
      std::fmax((weight_bytes + 128.0 * shape.tokens) / kSharedBytesPerUs, weight_bytes / kStreamBytesPerUs);
  const double step_us = std::fmax(tensor_us, load_us);
  const double area = static_cast<double>(shape.blocks) * shape.tokens;
  double us = rounds * (steps * step_us + kEpilogueUs * area);
  // Multiprocessors without a tile in the last round load the weights of the next kernel meanwhile.
  const int64_t idle = rounds * wave - whole;
  if (weights_ready && m <= 16 && split == 1 && rounds > 1)
    us -= std::fmin(steps * step_us * idle / wave, idle * kAheadBytes / kDeviceBytesPerUs);
  if (shared_rounds > 0)
    us += shared_rounds * ((steps * step_us + kEpilogueUs * area) / split + kReduceUs * std::log2(split) +
                           kExchangeUs * area * (split - 1) / split);
  // Loading from device memory and everything else overlap, but not perfectly: a smooth maximum.
  const double memory_us = static_cast<double>(n) * k * (kind == FG_W4A8 ? 0.5 : 1.0) / kDeviceBytesPerUs;
  const double a = us * us, b = memory_us * memory_us;
  return std::sqrt(std::sqrt(a * a + b * b));
}

}  // namespace

Plan choose_plan(int kind, int64_t m, int64_t n, int64_t k, bool weights_ready, int sms) {
  // Few tokens: the narrowest tile that holds them all; up to 96: one that holds them all.
  int narrow = 8;
  while (narrow < m && narrow < 64) narrow *= 2;
  const int least = m <= 96 ? 96 : 64;
  const int steps = ceil_div(k, 128);
  Plan best{};
  double best_us = INFINITY;
  for (const Shape shape : kShapes) {
    if (kind == FG_W8A8 && shape.blocks > 1) continue;
    if (m <= 64 ? shape.tokens != narrow : shape.tokens < least) continue;
    for (const int split : {1, 2, 3, 4, 8}) {
      if (split > 1 && steps < 2 * split) break;
      if (split == 3 && shape.tokens > kMaxThirdsTokens) continue;
      const double us = estimate_us(kind, m, n, k, weights_ready, sms, shape, split);
      if (us < best_us) {
        best_us = us;
        best = Plan{shape.blocks, shape.tokens, split, shape.tokens == 256 ? 8 : 16};
      }
    }
  }
  return best;
}

// Split reductions go through distributed shared memory.
int64_t workspace_bytes(int, int64_t, int64_t, int64_t) { return 0; }

}  // namespace fg::sm90

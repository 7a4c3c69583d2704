// The choice of tile shape, cluster size and split for one GEMM on sm_90a.
#pragma once

#include <stdint.h>

namespace fg::sm90 {

// What the two CTAs of a cluster load once for both, each one half: their tiles differ in the other operand alone.
enum Share : int { kShareNothing, kShareTokens, kShareWeights };

// A third kind beside FG_W4A8 and FG_W8A8: int4 with a scale for each 128 columns.
constexpr int kW4A8Grouped = 2;

struct Plan {
  int warpgroups;  // 64-row blocks per tile
  int tokens;      // tokens per tile
  int split;       // CTAs (1, 2, 3, 4 or 8) of the clusters that compute the tiles that do not fill the device
  Share share;     // what pairs of CTAs share; only with split 1
  int group;       // token tiles walked before the next row tile, or pairs of them with kShareWeights
};

// The plan with the smallest estimated time on a device with `sms` multiprocessors.  weights_ready: see gemm_args.h; the
// plan then counts on a next kernel that makes the same promise.
Plan choose_plan(int kind, int64_t m, int64_t n, int64_t k, bool weights_ready, int sms);

// Whether an instance can run this plan (kShareNothing) for m tokens.
bool is_plan(const Plan& plan, int64_t m);

}  // namespace fg::sm90

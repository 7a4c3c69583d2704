// The choice of tile shape, cluster size and split for one GEMM on sm_90a.
#pragma once

#include <stdint.h>

namespace fg::sm90 {

struct Plan {
  int blocks;  // 64-row blocks per consumer warpgroup (tile rows = 128 * blocks)
  int tokens;  // tokens per tile
  int split;   // cluster size (1, 2, 3, 4 or 8); the tiles that do not fill the device are computed by a whole cluster each
  int group;   // token tiles walked before the next row tile
};

// The plan with the smallest estimated time on a device with `sms` multiprocessors.  weights_ready: see gemm_args.h; the
// plan then counts on a next kernel that makes the same promise.
Plan choose_plan(int kind, int64_t m, int64_t n, int64_t k, bool weights_ready, int sms);

}  // namespace fg::sm90

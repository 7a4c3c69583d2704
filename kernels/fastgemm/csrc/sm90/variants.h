// The products that FastGEMM is compared with, on sm_90a.  As in gemm_args.h each returns an FG_* code and m >= 1 is
// guaranteed.  forced: a plan that is_plan() accepts, or nullptr for the one with the smallest estimated time.
#pragma once

#include "../common/gemm_args.h"
#include "plan.h"

namespace fg::sm90 {

// args.w_scale is group_scale[K / 128, N], 16-byte aligned; K % 128 == 0, no bias, out_dtype not FG_I32.
int w4a8_grouped(const GemmArgs& args, const Plan* forced);

// The accumulators hold 16 times a sum of products of at most 128 * 15.
constexpr int64_t kMaxZeroPointK = 65536;

// Unsigned int4 weights; zero[N] in 0..15, x_sum[M] the sum of each token's values.  K at most kMaxZeroPointK, no bias,
// out_dtype not FG_I32.
int w4a8_zero_point(const GemmArgs& args, const uint8_t* zero, const int32_t* x_sum, const Plan* forced);

}  // namespace fg::sm90

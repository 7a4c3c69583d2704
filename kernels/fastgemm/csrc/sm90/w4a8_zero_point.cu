#include "instances.cuh"
#include "variants.h"

namespace fg::sm90 {

// Its main loop is that of W4A8, so the same plans are the fastest.
int w4a8_zero_point(const GemmArgs& a, const uint8_t* zero, const int32_t* x_sum, const Plan* forced) {
  return run_gemm<ZeroPointConfig>(FG_W4A8, a, forced, Extra{zero, x_sum});
}

}  // namespace fg::sm90

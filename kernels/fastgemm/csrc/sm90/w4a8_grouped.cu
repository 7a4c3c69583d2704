#include "instances.cuh"
#include "variants.h"

namespace fg::sm90 {

int w4a8_grouped(const GemmArgs& a, const Plan* forced) { return run_gemm<GroupedConfig>(kW4A8Grouped, a, forced); }

}  // namespace fg::sm90

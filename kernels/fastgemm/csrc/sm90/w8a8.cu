#include "instances.cuh"

namespace fg::sm90 {

int w8a8(const GemmArgs& a) { return run_gemm<false>(a); }

#ifdef FASTGEMM_TUNING
int w8a8_plan(const GemmArgs& a, const Plan& plan) { return launch_plan<false>(a, plan); }
#endif

}  // namespace fg::sm90

#include "instances.cuh"

namespace fg::sm90 {

int w4a8(const GemmArgs& a) { return launch_plan<true>(a, choose_plan(FG_W4A8, a.m, a.n, a.k)); }

#ifdef FASTGEMM_TUNING
int w4a8_plan(const GemmArgs& a, const Plan& plan) { return launch_plan<true>(a, plan); }
#endif

}  // namespace fg::sm90

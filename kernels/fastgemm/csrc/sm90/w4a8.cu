#include "instances.cuh"

namespace fg::sm90 {

int w4a8(const GemmArgs& a) { return run_gemm<true>(a); }

#ifdef FASTGEMM_TUNING
int w4a8_plan(const GemmArgs& a, const Plan& plan) { return launch_plan<true>(a, plan); }
int resident(int size) {
  int clusters = 0;
  const int code = resident_clusters<Config<true, 2, 64>>(0, size, &clusters);
  return code == FG_OK ? clusters : -code;
}
#endif

}  // namespace fg::sm90

#include "instances.cuh"

namespace fg::sm90 {

int w4a8(const GemmArgs& a) { return run_gemm<Int4Config>(FG_W4A8, a); }

}  // namespace fg::sm90

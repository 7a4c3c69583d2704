#include "instances.cuh"

namespace fg::sm90 {

int w8a8(const GemmArgs& a) { return run_gemm<Int8Config>(FG_W8A8, a); }

}  // namespace fg::sm90

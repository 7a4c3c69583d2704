#include "instances.cuh"

namespace fg::sm90 {

int w4a8(const GemmArgs& a) { return run_gemm<true>(a); }

}  // namespace fg::sm90

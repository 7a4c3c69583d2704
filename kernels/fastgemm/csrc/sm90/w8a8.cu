#include "instances.cuh"

namespace fg::sm90 {

int w8a8(const GemmArgs& a) { return run_gemm<false>(a); }

}  // namespace fg::sm90

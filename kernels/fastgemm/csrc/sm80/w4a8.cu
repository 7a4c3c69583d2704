// W4A8 on mma.sync: packed int4 weights, int8 activations.
#include "launch.cuh"

namespace fg {
namespace sm80 {

int w4a8(const GemmArgs& args) { return run<Weights::kInt4>(args); }

int64_t w4a8_workspace_bytes(int64_t m, int64_t n, int64_t k) { return workspace<Weights::kInt4>(m, n, k); }

}  // namespace sm80
}  // namespace fg

// W8A8 on mma.sync: int8 weights [N, K], int8 activations.
#include "launch.cuh"

namespace fg {
namespace sm80 {

int64_t w4a8_workspace_bytes(int64_t m, int64_t n, int64_t k);

int w8a8(const GemmArgs& args) { return run<Weights::kInt8>(args); }

int64_t workspace_bytes(int kind, int64_t m, int64_t n, int64_t k) {
  return kind == FG_W4A8 ? w4a8_workspace_bytes(m, n, k) : workspace<Weights::kInt8>(m, n, k);
}

}  // namespace sm80
}  // namespace fg

// W4A8 with a zero point per channel, subtracted from every weight before the product.
#include "../sm80/launch.cuh"
#include "ablation.h"
#include "checks.h"

namespace fg {
namespace ablation {
int64_t grouped_workspace_bytes(int64_t m, int64_t n, int64_t k);
}  // namespace ablation
}  // namespace fg

extern "C" int fg_ablation_asymmetric_gemm(const int8_t* x, const float* x_scale, const uint8_t* w_packed,
                                           const float* w_scale, const uint8_t* w_zero, void* out, int64_t m,
                                           int64_t n, int64_t k, int out_dtype, void* workspace,
                                           int64_t workspace_bytes, void* stream) {
  const fg::GemmArgs args{x, x_scale, w_packed, w_scale, nullptr, out, m, n, k, out_dtype, workspace, workspace_bytes,
                          static_cast<cudaStream_t>(stream)};
  const int code = fg::ablation::check(args, w_scale != nullptr && w_zero != nullptr);
  if (code != FG_OK || m == 0) return code;
  if (workspace_bytes < fg_ablation_workspace_bytes(FG_ABLATION_ASYMMETRIC, m, n, k)) return FG_ERROR_WORKSPACE;
  fg::sm80::Extra extra;
  extra.zero = w_zero;
  return fg::sm80::run<fg::sm80::Weights::kAsymmetric>(args, extra);
}

extern "C" int64_t fg_ablation_workspace_bytes(int kind, int64_t m, int64_t n, int64_t k) {
  if (m <= 0 || n <= 0 || k <= 0) return 0;
  return kind == FG_ABLATION_GROUPED ? fg::ablation::grouped_workspace_bytes(m, n, k)
                                     : fg::sm80::workspace<fg::sm80::Weights::kAsymmetric>(m, n, k);
}

// W4A8 with a scale for each 128 columns of the weight.
#include "../sm80/launch.cuh"
#include "ablation.h"
#include "checks.h"

extern "C" int fg_ablation_grouped_gemm(const int8_t* x, const float* x_scale, const uint8_t* w_packed,
                                        const float* group_scale, void* out, int64_t m, int64_t n, int64_t k,
                                        int out_dtype, void* workspace, int64_t workspace_bytes, void* stream) {
  const fg::GemmArgs args{x, x_scale, w_packed, nullptr, nullptr, out, m, n, k, out_dtype, workspace, workspace_bytes,
                          static_cast<cudaStream_t>(stream)};
  const int code = fg::ablation::check(args, group_scale != nullptr);
  if (code != FG_OK || m == 0) return code;
  if (k % fg::sm80::kGroupSize != 0) return FG_ERROR_SIZE;
  if (workspace_bytes < fg_ablation_workspace_bytes(FG_ABLATION_GROUPED, m, n, k)) return FG_ERROR_WORKSPACE;
  fg::sm80::Extra extra;
  extra.group_scale = group_scale;
  return fg::sm80::run<fg::sm80::Weights::kGrouped>(args, extra);
}

namespace fg {
namespace ablation {

int64_t grouped_workspace_bytes(int64_t m, int64_t n, int64_t k) {
  return sm80::workspace<sm80::Weights::kGrouped>(m, n, k);
}

}  // namespace ablation
}  // namespace fg

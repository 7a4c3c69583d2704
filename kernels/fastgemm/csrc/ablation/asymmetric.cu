// W4A8 with a zero point per channel.
#include "../sm80/launch.cuh"
#include "../sm90/variants.h"
#include "ablation.h"
#include "prepare.h"

extern "C" int fg_ablation_asymmetric_gemm(const int8_t* x, const float* x_scale, const int32_t* x_sum_or_null,
                                           const uint8_t* w_packed, const float* w_scale, const uint8_t* w_zero,
                                           void* out, int64_t m, int64_t n, int64_t k, int out_dtype, void* workspace,
                                           int64_t workspace_bytes, int arch, const int* plan, void* stream) {
  using namespace fg::ablation;
  fg::GemmArgs args{x, x_scale, w_packed, w_scale, nullptr, out, m, n, k, out_dtype, workspace, workspace_bytes,
                    static_cast<cudaStream_t>(stream), false};
  int path = 0;
  int code = prepare(&args, w_scale != nullptr && w_zero != nullptr, arch, plan, &path);
  if (code != FG_OK || m == 0) return code;
  const bool needs_workspace = path == 80 || x_sum_or_null == nullptr;
  if (needs_workspace && workspace_bytes < fg_ablation_workspace_bytes(FG_ABLATION_ASYMMETRIC, m, n, k, arch))
    return FG_ERROR_WORKSPACE;
  if (path == 90) {
    ForcedPlan forced;
    if (k > fg::sm90::kMaxZeroPointK || !forced.read(plan, m)) return FG_ERROR_SIZE;
    const int32_t* x_sum = x_sum_or_null;
    if (x_sum == nullptr) {
      if (workspace == nullptr) return FG_ERROR_NULL_POINTER;
      code = token_sums(x, static_cast<int32_t*>(workspace), m, k, args.stream);
      if (code != FG_OK) return code;
      x_sum = static_cast<const int32_t*>(workspace);
    }
    return fg::sm90::w4a8_zero_point(args, w_zero, x_sum, forced.pointer);
  }
  fg::sm80::Extra extra;
  extra.zero = w_zero;
  return fg::sm80::run<fg::sm80::Weights::kAsymmetric>(args, extra);
}

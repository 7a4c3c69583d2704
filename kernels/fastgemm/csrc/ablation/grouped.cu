// W4A8 with a scale for each 128 columns of the weight.
#include "../sm80/launch.cuh"
#include "../sm90/variants.h"
#include "ablation.h"
#include "prepare.h"

extern "C" int fg_ablation_grouped_gemm(const int8_t* x, const float* x_scale, const uint8_t* w_packed,
                                        const float* group_scale, void* out, int64_t m, int64_t n, int64_t k,
                                        int out_dtype, void* workspace, int64_t workspace_bytes, int arch,
                                        const int* plan, void* stream) {
  using namespace fg::ablation;
  fg::GemmArgs args{x, x_scale, w_packed, group_scale, nullptr, out, m, n, k, out_dtype, workspace, workspace_bytes,
                    static_cast<cudaStream_t>(stream), false};
  int path = 0;
  const int code = prepare(&args, group_scale != nullptr, arch, plan, &path);
  if (code != FG_OK || m == 0) return code;
  if (k % fg::sm80::kGroupSize != 0) return FG_ERROR_SIZE;
  if (!aligned16(group_scale)) return FG_ERROR_ALIGNMENT;
  if (path == 90) {
    ForcedPlan forced;
    return forced.read(plan, m) ? fg::sm90::w4a8_grouped(args, forced.pointer) : FG_ERROR_SIZE;
  }
  if (workspace_bytes < fg_ablation_workspace_bytes(FG_ABLATION_GROUPED, m, n, k, arch)) return FG_ERROR_WORKSPACE;
  args.w_scale = nullptr;
  fg::sm80::Extra extra;
  extra.group_scale = group_scale;
  return fg::sm80::run<fg::sm80::Weights::kGrouped>(args, extra);
}

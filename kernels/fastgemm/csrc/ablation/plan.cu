// What the products of the ablation need and how they run.
#include "../sm80/launch.cuh"
#include "ablation.h"
#include "prepare.h"

extern "C" int64_t fg_ablation_workspace_bytes(int kind, int64_t m, int64_t n, int64_t k, int arch) {
  if (m <= 0 || n <= 0 || k <= 0) return 0;
  int error = FG_OK;
  const int path = fg::choose_path(arch & ~FG_WEIGHTS_READY, &error);
  if (path == 0) return 0;
  const bool grouped = kind == FG_ABLATION_GROUPED;
  if (path == 90) return grouped ? 0 : m * 4;  // sums of the tokens
  return grouped ? fg::sm80::workspace<fg::sm80::Weights::kGrouped>(m, n, k)
                 : fg::sm80::workspace<fg::sm80::Weights::kAsymmetric>(m, n, k);
}

extern "C" int fg_ablation_plan(int kind, int64_t m, int64_t n, int64_t k, int arch, int* plan) {
  if (m <= 0 || n <= 0 || k <= 0) return FG_ERROR_SIZE;
  if (plan == nullptr) return FG_ERROR_NULL_POINTER;
  int error = FG_OK;
  const int path = fg::choose_path(arch & ~FG_WEIGHTS_READY, &error);
  if (path != 90) return path == 0 ? error : FG_ERROR_ARCH;
  const int sms = fg::device_multiprocessors();
  if (sms < 0) return FG_ERROR_CUDA - sms;
  const fg::sm90::Plan chosen = fg::sm90::choose_plan(kind == FG_ABLATION_GROUPED ? fg::sm90::kW4A8Grouped : FG_W4A8, m,
                                                      n, k, (arch & FG_WEIGHTS_READY) != 0, sms);
  if (chosen.warpgroups == 0) return FG_ERROR_ARCH;  // a library without sm_90a
  plan[0] = chosen.warpgroups, plan[1] = chosen.tokens, plan[2] = chosen.split, plan[3] = chosen.share;
  return FG_OK;
}

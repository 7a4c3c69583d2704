// What the products of the ablation do before their launch.
#pragma once

#include "../common/path.h"
#include "../sm90/plan.h"
#include "checks.h"

namespace fg {
namespace ablation {

// Checks a product's arguments and completes them by `arch`; *path: 80 or 90.  FG_OK also for m = 0, without a path.
inline int prepare(GemmArgs* a, bool weight_present, int arch, const int* plan, int* path) {
  int code = check(*a, weight_present);
  if (code != FG_OK || a->m == 0) return code;
  a->weights_ready = (arch & FG_WEIGHTS_READY) != 0;
  *path = choose_path(arch & ~FG_WEIGHTS_READY, &code);
  if (*path == 0) return code;
  return plan != nullptr && *path != 90 ? FG_ERROR_ARCH : FG_OK;
}

// A caller's plan.
struct ForcedPlan {
  sm90::Plan value;
  const sm90::Plan* pointer = nullptr;  // nullptr without one

  // Whether there is none, or it can run.
  bool read(const int* plan, int64_t m) {
    if (plan == nullptr) return true;
    value = {plan[0], plan[1], plan[2], sm90::kShareNothing, plan[1] == 256 ? 8 : 16};
    pointer = &value;
    return sm90::is_plan(value, m);
  }
};

// sums[M] of x int8 [M, K], K a multiple of 16; both 16-byte aligned.
int token_sums(const int8_t* x, int32_t* sums, int64_t m, int64_t k, cudaStream_t stream);

}  // namespace ablation
}  // namespace fg

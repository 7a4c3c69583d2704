#pragma once

#include "../common/gemm_args.h"

namespace fg {
namespace ablation {

inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// The checks of api.cu for the ablation kernels; FG_OK also for m = 0.
inline int check(const GemmArgs& a, bool scales_present) {
  if (a.m < 0 || a.m > 65536 || a.n <= 0 || a.n % 16 != 0 || a.n > INT32_MAX || a.k <= 0 || a.k % 32 != 0 ||
      a.k > 131040)
    return FG_ERROR_SIZE;
  if (a.out_dtype != FG_F16 && a.out_dtype != FG_BF16 && a.out_dtype != FG_F32) return FG_ERROR_DTYPE;
  if (a.m == 0) return FG_OK;
  if (!a.x || !a.w || !a.out || !a.x_scale || !scales_present) return FG_ERROR_NULL_POINTER;
  if (!aligned16(a.x) || !aligned16(a.w) || !aligned16(a.out)) return FG_ERROR_ALIGNMENT;
  return FG_OK;
}

}  // namespace ablation
}  // namespace fg

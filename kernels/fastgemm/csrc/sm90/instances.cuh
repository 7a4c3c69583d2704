// The compiled kernel instances and the jump from a plan to its instance.
#pragma once

#include "launch.cuh"

namespace fg::sm90 {

template <bool kInt4>
int launch_plan(const GemmArgs& a, const Plan& plan) {
#define FG_INSTANCE(warpgroups_, tokens_, step_k_)              \
  if (plan.warpgroups == warpgroups_ && plan.tokens == tokens_) \
    return launch<Config<kInt4, warpgroups_, tokens_, step_k_>>(a, plan);
  if constexpr (kInt4) {
    // With few tokens the requests for a stage take longer than the loads themselves: stages twice as long.
    if (a.k % (2 * kBoxK) == 0) {
      FG_INSTANCE(2, 8, 2 * kBoxK)
      FG_INSTANCE(2, 16, 2 * kBoxK)
    }
  }
  FG_INSTANCE(1, 64, 2 * kBoxK)
  FG_INSTANCE(1, 128, kInt4 ? 2 * kBoxK : kBoxK)
  FG_INSTANCE(2, 8, kBoxK)
  FG_INSTANCE(2, 16, kBoxK)
  FG_INSTANCE(2, 32, kBoxK)
  FG_INSTANCE(2, 64, kBoxK)
  FG_INSTANCE(2, 96, kBoxK)
  FG_INSTANCE(2, 128, kBoxK)
  FG_INSTANCE(2, 192, kBoxK)
  FG_INSTANCE(2, 256, kBoxK)
#undef FG_INSTANCE
  return FG_ERROR_SIZE;
}

template <bool kInt4>
int run_gemm(const GemmArgs& a) {
  int sms = 0;
  const int code = multiprocessors(&sms);
  if (code != FG_OK) return code;
  return launch_plan<kInt4>(a, choose_plan(kInt4 ? FG_W4A8 : FG_W8A8, a.m, a.n, a.k, a.weights_ready, sms));
}

}  // namespace fg::sm90

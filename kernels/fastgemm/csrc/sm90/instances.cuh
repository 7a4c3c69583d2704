// The compiled kernel instances and the jump from a plan to its instance.
#pragma once

#include "launch.cuh"

namespace fg::sm90 {

template <int kWarpgroups, int kTokens, int kStepK>
using Int4Config = Config<true, kWarpgroups, kTokens, kStepK>;
template <int kWarpgroups, int kTokens, int kStepK>
using Int8Config = Config<false, kWarpgroups, kTokens, kStepK>;

// The plan's instance of a kind of product: Int4Config, Int8Config, GroupedConfig or ZeroPointConfig.
template <template <int, int, int> class Kind>
int launch_plan(const GemmArgs& a, const Plan& plan, const Extra& extra) {
  constexpr bool kInt4 = Kind<2, 8, kBoxK>::kInt4;
#define FG_INSTANCE(warpgroups_, tokens_, step_k_)              \
  if (plan.warpgroups == warpgroups_ && plan.tokens == tokens_) \
    return launch<Kind<warpgroups_, tokens_, step_k_>>(a, plan, extra);
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

// planned_as: the kind of product choose_plan knows; forced: this plan instead, which is_plan() accepts.
template <template <int, int, int> class Kind>
int run_gemm(int planned_as, const GemmArgs& a, const Plan* forced = nullptr, const Extra& extra = {}) {
  if (forced != nullptr) return launch_plan<Kind>(a, *forced, extra);
  int sms = 0;
  const int code = multiprocessors(&sms);
  if (code != FG_OK) return code;
  return launch_plan<Kind>(a, choose_plan(planned_as, a.m, a.n, a.k, a.weights_ready, sms), extra);
}

}  // namespace fg::sm90

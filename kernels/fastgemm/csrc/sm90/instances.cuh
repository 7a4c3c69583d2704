// The compiled kernel instances and the jump from a plan to its instance.
#pragma once

#include "launch.cuh"

namespace fg::sm90 {

template <bool kInt4>
int launch_plan(const GemmArgs& a, const Plan& plan) {
#define FG_INSTANCE(blocks_, tokens_) \
  if (plan.blocks == blocks_ && plan.tokens == tokens_) return launch<Config<kInt4, blocks_, tokens_>>(a, plan);
  FG_INSTANCE(1, 8)
  FG_INSTANCE(1, 16)
  FG_INSTANCE(1, 32)
  FG_INSTANCE(1, 64)
  FG_INSTANCE(2, 8)
  FG_INSTANCE(2, 16)
  FG_INSTANCE(2, 32)
  FG_INSTANCE(2, 64)
  FG_INSTANCE(2, 96)
  FG_INSTANCE(2, 128)
  FG_INSTANCE(1, 128)
  FG_INSTANCE(1, 256)
#undef FG_INSTANCE
  return FG_ERROR_SIZE;
}

template <bool kInt4>
int run_gemm(const GemmArgs& a) {
  int sms = 0;
  const int code = multiprocessors(&sms);
  if (code != FG_OK) return code;
  return launch_plan<kInt4>(a, choose_plan(kInt4 ? FG_W4A8 : FG_W8A8, a.m, a.n, a.k, sms));
}

}  // namespace fg::sm90

// The main loops of a consumer warpgroup: pipeline stages -> int32 accumulators.
#pragma once

#include "../common/ptx_barrier.cuh"
#include "../common/ptx_copy.cuh"
#include "../common/ptx_wgmma.cuh"
#include "config.cuh"
#include "schedule.cuh"

namespace fg::sm90 {

// A stage that another CTA fills as well is free when both have read it: lane i reports to CTA i.
template <class C>
__device__ __forceinline__ void release_stage(const Params& p, const Shared& s, int stage, int lane) {
  if constexpr (C::kShares) {
    if (lane == 0 || (lane == 1 && p.share != kShareNothing)) ptx::barrier_arrive_cluster(s.release + 8 * stage);
  } else {
    if (lane == 0) ptx::barrier_arrive(s.empty + 8 * stage);
  }
}

template <class C>
__device__ __forceinline__ void pin(int (&acc)[C::kTokens / 2]) {
#pragma unroll
  for (int i = 0; i < C::kTokens / 2; ++i) ptx::wgmma_pin(acc[i]);
}

// Tokens of a stage, where they have barriers of their own.
template <class C>
__device__ __forceinline__ void wait_for_tokens(const Shared& s, const StagePosition& at) {
  if constexpr (C::kFewTokens) ptx::barrier_wait(s.full_tokens + 8 * at.stage, at.phase);
}

// Packed words of one stage -> registers: one 16-byte load per 64 reduction elements.
template <class C>
__device__ __forceinline__ void load_packed(uint4 (&raw)[C::kStepK / 64], uint32_t address) {
#pragma unroll
  for (int h = 0; h < C::kStepK / 64; ++h) raw[h] = ptx::load_shared_16(address + h * kPackedTile);
}

// 16 times the nibbles in the high halves of the bytes; unsigned ones minus 8.
template <class C>
__device__ __forceinline__ uint32_t high_nibbles(uint32_t w) {
  if constexpr (!C::kZeroPoint) return w & 0xF0F0F0F0u;
  uint32_t nibbles;  // (w ^ 0x80808080) & 0xF0F0F0F0, which the compiler makes two instructions
  asm("lop3.b32 %0, %1, %2, %3, 0x28;" : "=r"(nibbles) : "r"(w), "r"(0x80808080u), "r"(0xF0F0F0F0u));
  return nibbles;
}

template <class C>
__device__ __forceinline__ void unpack(uint32_t (&a)[2][4], const uint4& w) {
  a[0][0] = high_nibbles<C>(w.x);
  a[0][1] = high_nibbles<C>(w.x << 4);
  a[0][2] = high_nibbles<C>(w.y);
  a[0][3] = high_nibbles<C>(w.y << 4);
  a[1][0] = high_nibbles<C>(w.z);
  a[1][1] = high_nibbles<C>(w.z << 4);
  a[1][2] = high_nibbles<C>(w.w);
  a[1][3] = high_nibbles<C>(w.w << 4);
}

// int4: the A fragments are double-buffered; those of 64 columns are built while the tensor cores work on the last 64.
template <class C>
__device__ __forceinline__ void multiply_int4(int (&acc)[C::kTokens / 2], const Params& p, const Shared& s,
                                              StagePosition& at, int steps, int group, int lane) {
  constexpr int kParts = C::kStepK / 64;
  const uint32_t thread_weights =
      s.stages + C::kTokenBytes + group * (64 * C::kStepK / 2) + threadIdx.x % 128 * 16;
  uint4 raw[kParts];
  uint32_t fragment[2][2][4];
  ptx::barrier_wait(s.full + 8 * at.stage, at.phase);
  load_packed<C>(raw, thread_weights + at.stage * C::kStageBytes);
  int previous = 0;
  for (int step = 0; step < steps; ++step) {
    const uint64_t tokens = ptx::swizzled_descriptor(s.stages + at.stage * C::kStageBytes);
    const int current = at.stage;
#pragma unroll
    for (int h = 0; h < kParts; ++h) {
      auto& a = fragment[h % 2];
      unpack<C>(a, raw[h]);
#pragma unroll
      for (int i = 0; i < 8; ++i) ptx::wgmma_pin(a[i / 4][i % 4]);
      pin<C>(acc);
      ptx::wgmma_fence();
      const uint64_t columns = tokens + h / 2 * (C::kTokens * kBoxK / 16) + 4 * (h % 2);
#pragma unroll
      for (int kk = 0; kk < 2; ++kk) ptx::Wgmma<C::kTokens>::rs(acc, a[kk], columns + 2 * kk, step | h | kk);
      ptx::wgmma_commit();
      if (h == kParts - 1) {
        at.advance(p.stages);
        if (step + 1 < steps) {
          ptx::barrier_wait(s.full + 8 * at.stage, at.phase);
          load_packed<C>(raw, thread_weights + at.stage * C::kStageBytes);
        }
      }
      ptx::wgmma_wait<1>();
      if (h == 0 && step > 0) release_stage<C>(p, s, previous, lane);
    }
    previous = current;
  }
  ptx::wgmma_wait<0>();
  pin<C>(acc);
  release_stage<C>(p, s, previous, lane);
}

// int4, few tokens: one group of wgmma a stage, because with few tokens its latency is most of the time; the fragments of
// a stage are built while the tensor cores work on the last one.
template <class C>
__device__ __forceinline__ void multiply_int4_few(int (&acc)[C::kTokens / 2], const Params& p, const Shared& s,
                                                  StagePosition& at, int steps, int group, int lane) {
  constexpr int kParts = C::kStepK / 64;
  const uint32_t thread_weights =
      s.stages + C::kTokenBytes + group * (64 * C::kStepK / 2) + threadIdx.x % 128 * 16;
  uint4 raw[kParts];
  uint32_t fragment[2][kParts][2][4];
  ptx::barrier_wait(s.full + 8 * at.stage, at.phase);
  load_packed<C>(raw, thread_weights + at.stage * C::kStageBytes);
  int previous = 0;
  const auto multiply = [&](uint32_t (&a)[kParts][2][4], int step) {
    const uint64_t tokens = ptx::swizzled_descriptor(s.stages + at.stage * C::kStageBytes);
    const int current = at.stage;
#pragma unroll
    for (int h = 0; h < kParts; ++h) {
      unpack<C>(a[h], raw[h]);
#pragma unroll
      for (int i = 0; i < 8; ++i) ptx::wgmma_pin(a[h][i / 4][i % 4]);
    }
    wait_for_tokens<C>(s, at);
    pin<C>(acc);
    ptx::wgmma_fence();
#pragma unroll
    for (int h = 0; h < kParts; ++h) {
      const uint64_t columns = tokens + h / 2 * (C::kTokens * kBoxK / 16) + 4 * (h % 2);
#pragma unroll
      for (int kk = 0; kk < 2; ++kk) ptx::Wgmma<C::kTokens>::rs(acc, a[h][kk], columns + 2 * kk, step | h | kk);
    }
    ptx::wgmma_commit();
    at.advance(p.stages);
    if (step + 1 < steps) {
      ptx::barrier_wait(s.full + 8 * at.stage, at.phase);
      load_packed<C>(raw, thread_weights + at.stage * C::kStageBytes);
    }
    ptx::wgmma_wait<1>();
    if (step > 0) release_stage<C>(p, s, previous, lane);
    previous = current;
  };
#pragma unroll 1
  for (int step = 0;; ++step) {
    multiply(fragment[0], step);
    if (++step == steps) break;
    multiply(fragment[1], step);
    if (step + 1 == steps) break;
  }
  ptx::wgmma_wait<0>();
  pin<C>(acc);
  release_stage<C>(p, s, previous, lane);
}

template <class C>
__device__ __forceinline__ void multiply_int8(int (&acc)[C::kTokens / 2], const Params& p, const Shared& s,
                                              StagePosition& at, int steps, int group, int lane) {
  constexpr int kNextWeights = C::kRows * kBoxK / 16, kNextTokens = C::kTokens * kBoxK / 16;  // columns 128 ..
  int previous = 0;
  for (int step = 0; step < steps; ++step) {
    ptx::barrier_wait(s.full + 8 * at.stage, at.phase);
    wait_for_tokens<C>(s, at);
    const uint32_t base = s.stages + at.stage * C::kStageBytes;
    const uint64_t tokens = ptx::swizzled_descriptor(base);
    const uint64_t weights = ptx::swizzled_descriptor(base + C::kTokenBytes + group * 64 * kBoxK);
    pin<C>(acc);
    ptx::wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < C::kStepK / 32; ++kk)
      ptx::Wgmma<C::kTokens>::ss(acc, weights + kk / 4 * kNextWeights + 2 * (kk % 4),
                                 tokens + kk / 4 * kNextTokens + 2 * (kk % 4), step | kk);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    if (step > 0) release_stage<C>(p, s, previous, lane);
    previous = at.stage;
    at.advance(p.stages);
  }
  ptx::wgmma_wait<0>();
  pin<C>(acc);
  release_stage<C>(p, s, previous, lane);
}

}  // namespace fg::sm90

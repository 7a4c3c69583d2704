// The main loop with a weight scale per group of columns: pipeline stages -> fp32 sums.
#pragma once

#include <type_traits>

#include "../common/ptx_barrier.cuh"
#include "../common/ptx_copy.cuh"
#include "../common/ptx_wgmma.cuh"
#include "config.cuh"
#include "multiply.cuh"
#include "schedule.cuh"

namespace fg::sm90 {

// int4 with a scale per group (GroupedConfig).  The wgmma of a unit, kSlice tokens of one group (with few tokens: of all
// groups of a stage), start their int32 sums from 0 in one of two sets of registers.  Meanwhile the sums of the unit
// before, in the other set, are scaled and added in fp32: total = fma(float(16 * sum), scale, total), groups ascending.
// float(...) is exact (|sum| <= 2^17), and the 16 leaves at the end.  Returns the bits of the fp32 sums.
template <class C>
__device__ __forceinline__ void multiply_grouped(int (&result)[C::kTokens / 2], const Params& p, const Shared& s,
                                                 StagePosition& at, int steps, int group, int lane) {
  constexpr int kParts = C::kStepK / 64, kGroupParts = kGroupSize / 64;
  constexpr int kUnitGroups = C::kFewTokens ? C::kGroups : 1;
  constexpr int kUnits = C::kGroups / kUnitGroups * C::kSlices;
  constexpr int kSums = C::kSlice / 2;
  const uint32_t thread_weights =
      s.stages + C::kTokenBytes + group * (64 * C::kStepK / 2) + threadIdx.x % 128 * 16;
  const uint32_t thread_scales = s.weight_scales + (group * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4) * 4;
  uint4 raw[kParts];
  uint32_t fragment[2][kParts][2][4];
  float scale[2][C::kGroups][2] = {};  // of rows g and g + 8
  int acc[2][kUnitGroups][kSums];
  float total[C::kTokens / 2] = {};
#pragma unroll
  for (int q = 0; q < kUnitGroups; ++q)
#pragma unroll
    for (int i = 0; i < kSums; ++i) acc[1][q][i] = 0;  // what comes before the first unit
  const auto pin_unit = [](int (&unit)[kUnitGroups][kSums]) {
#pragma unroll
    for (int q = 0; q < kUnitGroups; ++q)
#pragma unroll
      for (int i = 0; i < kSums; ++i) ptx::wgmma_pin(unit[q][i]);
  };
  const auto finish_unit = [&](int (&unit)[kUnitGroups][kSums], const float (&scales)[C::kGroups][2], int index) {
    const int first = index % C::kSlices * kSums;
    pin_unit(unit);
#pragma unroll
    for (int q = 0; q < kUnitGroups; ++q)
#pragma unroll
      for (int i = 0; i < kSums; ++i)
        total[first + i] = __fmaf_rn(__int2float_rn(unit[q][i]), scales[index / C::kSlices * kUnitGroups + q][i / 2 % 2],
                                     total[first + i]);
#pragma unroll
    for (int i = 0; i < kSums; ++i) ptx::wgmma_pin(total[first + i]);
  };
  ptx::barrier_wait(s.full + 8 * at.stage, at.phase);
  load_packed<C>(raw, thread_weights + at.stage * C::kStageBytes);
  int previous = 0;
  const auto multiply_stage = [&](auto parity, int step) {
    constexpr int b = decltype(parity)::value, kFirst = b * kUnits;
    auto& a = fragment[b];
    const uint64_t tokens = ptx::swizzled_descriptor(s.stages + at.stage * C::kStageBytes);
    const int current = at.stage;
    const auto unpack_parts = [&](int first, int count) {
#pragma unroll
      for (int h = first; h < first + count; ++h) {
        unpack<C>(a[h], raw[h]);
#pragma unroll
        for (int i = 0; i < 8; ++i) ptx::wgmma_pin(a[h][i / 4][i % 4]);
      }
    };
    unpack_parts(0, kUnitGroups * kGroupParts);
    wait_for_tokens<C>(s, at);
#pragma unroll
    for (int h = 0; h < C::kGroups; ++h)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        scale[b][h][half] =
            ptx::load_shared_float(thread_scales + at.stage * C::kScaleBytes + h * C::kRows * 4 + 32 * half);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      auto& unit = acc[(kFirst + u) % 2];
      auto& last = acc[(kFirst + u + 1) % 2];
      if (u > 0 && u % C::kSlices == 0) unpack_parts(u / C::kSlices * kGroupParts, kGroupParts);
      pin_unit(unit);
      ptx::wgmma_fence();
#pragma unroll
      for (int q = 0; q < kUnitGroups; ++q) {
        const int slice = u % C::kSlices, first_part = (u / C::kSlices * kUnitGroups + q) * kGroupParts;
#pragma unroll
        for (int i = 0; i < 2 * kGroupParts; ++i) {
          const int h = first_part + i / 2;
          const uint64_t columns =
              tokens + h / 2 * (C::kTokens * kBoxK / 16) + slice * (C::kSlice * kBoxK / 16) + 4 * (h % 2) + 2 * (i % 2);
          ptx::Wgmma<C::kSlice>::rs(unit[q], a[h][i % 2], columns, i);
        }
      }
      ptx::wgmma_commit();
      if (u == kUnits - 1) {
        at.advance(p.stages);
        if (step + 1 < steps) {
          ptx::barrier_wait(s.full + 8 * at.stage, at.phase);
          load_packed<C>(raw, thread_weights + at.stage * C::kStageBytes);
        }
      }
      ptx::wgmma_wait<1>();
      if (u == 0) {
        finish_unit(last, scale[1 - b], kUnits - 1);
        if (step > 0) release_stage<C>(p, s, previous, lane);
      } else {
        finish_unit(last, scale[b], u - 1);
      }
    }
    previous = current;
  };
  const auto finish_stage = [&](auto parity) {
    constexpr int b = decltype(parity)::value;
    ptx::wgmma_wait<0>();
    finish_unit(acc[(b * kUnits + kUnits - 1) % 2], scale[b], kUnits - 1);
  };
#pragma unroll 1
  for (int step = 0;;) {
    multiply_stage(std::integral_constant<int, 0>{}, step);
    if (++step == steps) {
      finish_stage(std::integral_constant<int, 0>{});
      break;
    }
    multiply_stage(std::integral_constant<int, 1>{}, step);
    if (++step == steps) {
      finish_stage(std::integral_constant<int, 1>{});
      break;
    }
  }
  release_stage<C>(p, s, previous, lane);
#pragma unroll
  for (int i = 0; i < C::kTokens / 2; ++i) result[i] = __float_as_int(total[i] * 0.0625f);
}

}  // namespace fg::sm90

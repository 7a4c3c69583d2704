// wgmma m64nNk32 of int8: each warp queues the products of its 16 rows; events compute them later, in order.
#include <string.h>

#include <array>

#include "emulator.h"
#include "scheduler.h"

namespace emulator {
namespace {

constexpr int kRows = 16;        // of a warp
constexpr int kDepth = 32;       // k of an instruction
constexpr int kRowBytes = 128;  // of an operand in shared memory, with the 128-byte swizzle

struct Lane {
  int* accumulators;
  const uint32_t* a;  // four registers, or nullptr: operand A comes from shared memory
  uint64_t a_descriptor, b_descriptor;
  bool accumulate;
};

using Lanes = std::array<Lane, 32>;

// Where the operand of a descriptor begins: bits 0..13 are its address / 16.
uint32_t operand_address(uint64_t descriptor) { return static_cast<uint32_t>(descriptor & 0x3FFF) << 4; }

// int16, so that the compiler finds the multiply-add of pairs.
void read_row(int16_t (&values)[kDepth], Cta& cta, uint32_t address) {
  for (int half = 0; half < 2; ++half) {
    const uint8_t* bytes = shared_at(cta, swizzle(address + 16 * half), 16);
    for (int i = 0; i < 16; ++i) values[16 * half + i] = static_cast<int8_t>(bytes[i]);
  }
}

// Fragment order of mma.m16n8k32: register q of lane 4 g + t holds row g + 8 (q % 2), columns 16 (q / 2) + 4 t ..
void read_fragments(int16_t (&a)[kRows][kDepth], const Lanes& lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int q = 0; q < 4; ++q) {
      for (int e = 0; e < 4; ++e)
        a[lane / 4 + 8 * (q % 2)][16 * (q / 2) + 4 * (lane % 4) + e] = static_cast<int8_t>(lanes[lane].a[q] >> (8 * e));
    }
  }
}

void multiply(Cta& cta, int warp_of_group, int n, const Lanes& lanes) {
  int16_t a[kRows][kDepth];
  if (lanes[0].a != nullptr) {
    read_fragments(a, lanes);
  } else {
    const uint32_t first = operand_address(lanes[0].a_descriptor) + warp_of_group * kRows * kRowBytes;
    for (int row = 0; row < kRows; ++row) read_row(a[row], cta, first + row * kRowBytes);
  }
  const uint32_t tokens = operand_address(lanes[0].b_descriptor);
  for (int j = 0; j < n; ++j) {
    int16_t b[kDepth];
    read_row(b, cta, tokens + j * kRowBytes);
    for (int row = 0; row < kRows; ++row) {
      int sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k];
      const Lane& lane = lanes[row % 8 * 4 + j % 8 / 2];
      int& accumulator = lane.accumulators[4 * (j / 8) + 2 * (row / 8) + j % 2];
      accumulator = (lane.accumulate ? accumulator : 0) + sum;
    }
  }
}

void schedule_first(Cta& cta, Warp& warp) {
  if (warp.scheduled || warp.multiplications.empty()) return;
  warp.scheduled = true;
  post(cta, kWgmma, [&cta, &warp] {
    const Multiplication first = std::move(warp.multiplications.front());
    warp.multiplications.pop_front();
    warp.scheduled = false;
    first.run();
    warp.waiters.wake();
    schedule_first(cta, warp);
  });
}

}  // namespace

void wgmma(int n, int* accumulators, const uint32_t* a, uint64_t a_descriptor, uint64_t b_descriptor, bool accumulate) {
  Lane mine{accumulators, a, a_descriptor, b_descriptor, accumulate};
  Cta& cta = *current->cta;
  Warp& warp = current->warp();
  const int warp_of_group = current->index / 32 % 4;
  warp_collective(kMultiply, &mine, [&](void* const (&brought)[32]) {
    Lanes lanes;
    for (int i = 0; i < 32; ++i) {
      lanes[i] = *static_cast<const Lane*>(brought[i]);
      if (lanes[i].a_descriptor != lanes[0].a_descriptor || lanes[i].b_descriptor != lanes[0].b_descriptor ||
          lanes[i].accumulate != lanes[0].accumulate)
        fail("the lanes of a warp give wgmma different operands");
    }
    Cta* const place = &cta;
    warp.multiplications.push_back(
        Multiplication{warp.committed, [=] { multiply(*place, warp_of_group, n, lanes); }});
    schedule_first(cta, warp);
  });
}

void wgmma_commit() {
  Warp& warp = current->warp();
  warp_collective(kCommit, nullptr, [&warp](void* const (&)[32]) { ++warp.committed; });
}

void wgmma_wait(int pending) {
  warp_sync();
  Warp& warp = current->warp();
  const int groups = warp.committed - pending;
  while (!warp.multiplications.empty() && warp.multiplications.front().group < groups) warp.waiters.block();
  may_switch();
}

}  // namespace emulator

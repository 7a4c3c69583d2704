// Stand-in for csrc/common/ptx_wgmma.cuh on the emulator.
#pragma once

#include "emulator.h"

namespace fg::ptx {

// Its lanes meet; that it orders register writes is not modelled.
inline void wgmma_fence() { emulator::warp_sync(); }

inline void wgmma_commit() { emulator::wgmma_commit(); }

template <int kPending>
inline void wgmma_wait() {
  emulator::wgmma_wait(kPending);
}

// Registers that wgmma reads or writes are variables in memory here, which the compiler must not keep elsewhere.
template <class Word>
inline void wgmma_pin(Word& value) {
  asm volatile("" : "+m"(value)::"memory");
}

// The fields of a K-major operand with the 128-byte swizzle; the emulator reads the address alone.
inline uint64_t swizzled_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kGroupStride = uint64_t{1024 / 16} << 32;
  constexpr uint64_t kLeadingStride = uint64_t{1} << 16;
  return kSwizzle128 | kGroupStride | kLeadingStride | (address & 0x3FFFF) >> 4;
}

template <int kTokens>
struct Wgmma {
  static void rs(int (&d)[kTokens / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    emulator::wgmma(kTokens, d, a, 0, b, accumulate != 0);
  }

  static void ss(int (&d)[kTokens / 2], uint64_t a, uint64_t b, int accumulate) {
    emulator::wgmma(kTokens, d, nullptr, a, b, accumulate != 0);
  }
};

}  // namespace fg::ptx

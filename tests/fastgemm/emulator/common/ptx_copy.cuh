// Stand-in for csrc/common/ptx_copy.cuh on the emulator.
#pragma once

#include "cuda_on_host.h"

namespace fg::ptx {

// Not modelled: L2 and its policies.
inline uint64_t policy_evict_first() { return 0; }
inline uint64_t policy_evict_last() { return 0; }
inline uint64_t policy_evict_unchanged() { return 0; }
inline void bulk_prefetch(const void*, uint32_t, uint64_t) {}
inline void tensor_prefetch(const CUtensorMap*, int, int, uint64_t) {}
inline void prefetch_tensor_map(const CUtensorMap*) {}

inline void bulk_load(uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier, uint64_t) {
  emulator::bulk_load(destination, source, bytes, barrier);
}

inline void tensor_load(uint32_t destination, const CUtensorMap* map, int inner, int outer, uint32_t barrier, uint64_t) {
  emulator::tensor_load(destination, map, inner, outer, barrier, emulator::kThisCta);
}

inline void tensor_load_pair(uint32_t destination, const CUtensorMap* map, int inner, int outer, uint32_t barrier,
                             uint64_t) {
  emulator::tensor_load(destination, map, inner, outer, barrier, emulator::kBothOfPair);
}

inline void tensor_store(const CUtensorMap* map, uint32_t source, int inner, int outer) {
  emulator::tensor_store(map, source, inner, outer);
}

inline void bulk_commit() { emulator::bulk_commit(); }

template <int kPending>
inline void bulk_wait_read() {
  emulator::bulk_wait_read(kPending);
}

inline void store_remote_16(uint32_t address, uint32_t barrier, const int* words) {
  emulator::store_remote_16(address, barrier, words);
}

template <class Value>
inline Value load_shared(uint32_t address) {
  emulator::may_switch();
  Value value;
  memcpy(&value, emulator::own_shared(address, sizeof value), sizeof value);
  return value;
}

inline uint4 load_shared_16(uint32_t address) { return load_shared<uint4>(address); }
inline float load_shared_float(uint32_t address) { return load_shared<float>(address); }
inline float2 load_shared_float2(uint32_t address) { return load_shared<float2>(address); }

inline void store_shared_4(uint32_t address, uint32_t value) {
  emulator::may_switch();
  memcpy(emulator::own_shared(address, sizeof value), &value, sizeof value);
}

// Of an 8x8 matrix of 16-bit elements spread over a warp, a lane holds row lane / 4, columns 2 (lane % 4) and the next.
inline uint16_t matrix_element(uint32_t word, int column) { return column % 2 ? word >> 16 : word & 0xFFFF; }

struct StoredMatrices {
  uint32_t address;
  uint32_t words[4];
};

inline void store_matrix_x4_trans(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  StoredMatrices mine{address, {a, b, c, d}};
  emulator::warp_collective(emulator::kStoreMatrix, &mine, [](void* const (&lanes)[32]) {
    const auto lane = [&](int index) { return static_cast<const StoredMatrices*>(lanes[index]); };
    for (int matrix = 0; matrix < 4; ++matrix) {
      for (int row = 0; row < 8; ++row) {
        uint16_t stored[8];  // the row in memory is a column of the matrix
        for (int i = 0; i < 8; ++i) stored[i] = matrix_element(lane(4 * i + row / 2)->words[matrix], row);
        memcpy(emulator::own_shared(lane(8 * matrix + row)->address, sizeof stored), stored, sizeof stored);
      }
    }
  });
}

struct TransposedMatrix {
  uint32_t before;
  uint32_t after;
};

inline uint32_t transpose_matrix(uint32_t word) {
  TransposedMatrix mine{word, 0};
  emulator::warp_collective(emulator::kTranspose, &mine, [](void* const (&lanes)[32]) {
    const auto lane = [&](int index) { return static_cast<TransposedMatrix*>(lanes[index]); };
    for (int i = 0; i < 32; ++i) {
      const int row = i / 4;
      const int column = 2 * (i % 4);
      const uint32_t low = matrix_element(lane(4 * column + row / 2)->before, row);
      const uint32_t high = matrix_element(lane(4 * (column + 1) + row / 2)->before, row);
      lane(i)->after = low | high << 16;
    }
  });
  return mine.after;
}

}  // namespace fg::ptx

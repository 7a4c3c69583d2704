// Stand-in for csrc/common/ptx_barrier.cuh on the emulator.
#pragma once

#include "emulator.h"

namespace fg::ptx {

inline uint32_t smem_address(const void*) { return emulator::shared_base(); }

inline void barrier_init(uint32_t barrier, uint32_t count) { emulator::barrier_init(barrier, count); }
inline void barrier_arrive(uint32_t barrier) { emulator::barrier_arrive(barrier, 0); }
inline void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) { emulator::barrier_arrive(barrier, bytes); }
inline void barrier_arrive_cluster(uint32_t barrier) { emulator::barrier_arrive_remote(barrier); }
inline void barrier_arrive_remote(uint32_t barrier) { emulator::barrier_arrive_remote(barrier); }
inline void barrier_wait(uint32_t barrier, uint32_t parity) { emulator::barrier_wait(barrier, parity); }
inline void barrier_wait_cluster(uint32_t barrier, uint32_t parity) { emulator::barrier_wait(barrier, parity); }
inline uint32_t remote_address(uint32_t address, uint32_t rank) { return emulator::address_in_cta(address, rank); }

inline void named_barrier_sync(int id, int threads) { emulator::named_barrier_sync(id, threads); }

inline uint32_t cluster_rank() { return emulator::cluster_rank(); }
inline int cluster_index() { return emulator::cluster_index(); }
inline void cluster_arrive_relaxed() { emulator::cluster_arrive(); }
inline void cluster_wait() { emulator::cluster_wait(); }
inline void cluster_wait_alone() { emulator::cluster_wait(); }

// Not modelled: the preceding kernel, the order of accesses, registers.
inline void grid_dependency_wait() { emulator::may_switch(); }
inline void grid_launch_dependents() {}
inline void fence_barrier_init() {}
inline void fence_async_shared() {}

template <int>
inline void registers_decrease() {}

template <int>
inline void registers_increase() {}

}  // namespace fg::ptx

// The largest value of all threads of a cluster in one trip between its multiprocessors: every warp writes its own into the
// shared memory of every block, counted by a barrier there.  A cluster barrier would take two trips: one until what was
// written has arrived, one to say so.  For grids launched in clusters of two blocks or more: elsewhere st.async is an
// illegal instruction.
#pragma once

#include "../common/dependency.cuh"
#include "../common/ptx_barrier.cuh"

namespace fg {
namespace elementwise {

constexpr int kClusterBlocks = 8;       // most blocks of a cluster, which are the grid's x dimension
constexpr int kMaxClusterThreads = 512;  // of a block

struct ClusterMax {
  uint32_t values[kClusterBlocks * kMaxClusterThreads / 32];
  uint64_t received;
};

__device__ __forceinline__ ClusterMax& cluster_max_memory() {
  __shared__ ClusterMax memory;
  return memory;
}

// By all threads, first of all: a block that has not started has no shared memory to write to.
__device__ __forceinline__ void cluster_max_prepare() {
#if defined(FG_HAS_DEPENDENT_LAUNCH)
  if (threadIdx.x == 0) {
    const uint32_t received = ptx::smem_address(&cluster_max_memory().received);
    ptx::barrier_init(received, 1);
    ptx::fence_barrier_init();
    ptx::barrier_arrive_expect(received, gridDim.x * (blockDim.x / 32) * sizeof(uint32_t));
  }
  __syncwarp();
  ptx::cluster_arrive_relaxed();
#endif
}

// Once, by all threads of whole warps.  No block ends before it has received everything, so none writes to one that has.
__device__ __forceinline__ uint32_t cluster_max(uint32_t value) {
#if defined(FG_HAS_DEPENDENT_LAUNCH)
  ClusterMax& memory = cluster_max_memory();
  const uint32_t warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  value = __reduce_max_sync(0xffffffffu, value);
  ptx::cluster_wait();
  const uint32_t received = ptx::smem_address(&memory.received);
  if (lane < gridDim.x) {
    const uint32_t place = ptx::smem_address(&memory.values[blockIdx.x * warps + warp]);
    ptx::store_remote_4(ptx::remote_address(place, lane), ptx::remote_address(received, lane), value);
  }
  ptx::barrier_wait(received, 0);
  for (uint32_t i = lane; i < gridDim.x * warps; i += 32) value = max(value, memory.values[i]);
  return __reduce_max_sync(0xffffffffu, value);
#else
  return value;
#endif
}

}  // namespace elementwise
}  // namespace fg

// An emulator of the Hopper GEMM kernels on the CPU.  It runs one launch of the real sources (csrc/sm90) compiled with g++.
//
// Modelled:
//   * Every CUDA thread is a fiber.  A seeded random scheduler decides which one runs and for how long; it starves one CTA,
//     one warp or one kind of asynchronous work for a while, so that rare orders of events become common.
//   * What the hardware does beside the threads is an event that happens later, at a random time: tensor and bulk loads,
//     tensor stores, st.async, arrivals at another CTA's barrier, and wgmma, which reads its operands (also those in
//     registers) when it runs, in order within a warp.  Destinations of copies are poisoned when the copy is issued.
//   * mbarriers (arrivals, bytes, phases), named barriers, the cluster barrier, bulk groups, wgmma groups, the 128-byte
//     swizzle, boxes that reach past a matrix.
// Found: deadlocks, too many arrivals, barriers left in the middle of a phase, CTAs that exit with events under way to them,
//   stores that still read the shared memory of a thread that exits, shared-memory addresses out of bounds or misaligned,
//   output elements that tensor stores write twice, warps that diverge in a collective instruction, data that are used
//   before they arrive or overwritten before they have been read (the driver compares the output bit for bit).
//
// Not modelled: the order of memory accesses.  Every access is visible to everybody at once, so a missing fence, above all
// one between the generic and the asynchronous proxy (fence.proxy.async, wgmma.fence), and a missing release or acquire go
// unnoticed.  Nor are time, registers, caches, prefetches, setmaxnreg and the kernel before this one modelled.
#pragma once

#include <cuda.h>
#include <stdint.h>

#include <functional>

namespace emulator {

// Prints the reason with the current product and thread and ends the process.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// What FAIL lines say about the product at hand.
void set_context(const char* context);

// Makes the next launch a function of `seed`.
void seed_scheduler(uint64_t seed, int switch_rarity);

// Events that have happened so far.
long events();

// Runs `kernel` in every thread of a one-dimensional grid until all have returned.
void launch(int grid, int threads, int shared_bytes, int cluster_size, const std::function<void()>& kernel);

// A tensor map as the emulator keeps it: a row-major matrix and the box that a copy moves.
struct TensorMap {
  uint8_t* base;
  int element_bytes;
  int64_t rows, columns;
  int box_rows, box_columns;
  bool swizzled;
};

// From here on the tensor stores into the rows x columns elements of an output are counted.
void watch_output(int64_t rows, int64_t columns);

// What follows is called by threads of the kernel, through common/*.cuh.  Shared-memory addresses carry the rank of the CTA
// in its cluster in their highest byte.

// Lets another thread or event go first, sometimes.
void may_switch();

uint32_t shared_base();
int cluster_rank();
int cluster_index();
uint32_t address_in_cta(uint32_t address, uint32_t rank);

// Checked access to this CTA's shared memory; `bytes` is also the alignment.
uint8_t* own_shared(uint32_t address, uint32_t bytes);

void barrier_init(uint32_t barrier, uint32_t count);
void barrier_arrive(uint32_t barrier, uint32_t expected_bytes);
void barrier_arrive_remote(uint32_t barrier);
void barrier_wait(uint32_t barrier, uint32_t parity);
void named_barrier_sync(int id, int threads);
void cta_sync();
void cluster_arrive();
void cluster_wait();

// The 32 lanes of a warp meet; the last one calls `together` with what each lane brought.
enum Collective { kSync, kStoreMatrix, kTranspose, kMultiply, kCommit };
void warp_collective(Collective kind, void* mine, const std::function<void(void* const (&lanes)[32])>& together);
void warp_sync();

enum Destination { kThisCta, kBothOfPair };
void tensor_load(uint32_t destination, const CUtensorMap* map, int inner, int outer, uint32_t barrier, Destination ctas);
void bulk_load(uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier);
void tensor_store(const CUtensorMap* map, uint32_t source, int inner, int outer);
void bulk_commit();
void bulk_wait_read(int pending);
void store_remote_16(uint32_t address, uint32_t barrier, const int* words);

// One wgmma m64nNk32 of int8: operand A from registers (a != nullptr) or through its descriptor.
void wgmma(int n, int* accumulators, const uint32_t* a, uint64_t a_descriptor, uint64_t b_descriptor, bool accumulate);
void wgmma_commit();
void wgmma_wait(int pending);

}  // namespace emulator

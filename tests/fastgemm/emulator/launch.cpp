// A launch from its first thread to its last, and what every thread knows about its place in it.
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "cuda_on_host.h"
#include "emulator.h"
#include "scheduler.h"

namespace emulator {

int cluster_size;

namespace {

constexpr size_t kSharedAllocation = 256 << 10;  // what a descriptor can address
constexpr int kSharedLimit = 232448;

const std::function<void()>* body;
std::vector<char*> stacks;  // kept from launch to launch

char* stack_of(size_t index) {
  while (stacks.size() <= index) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for the stacks");
    stacks.push_back(static_cast<char*>(stack));
  }
  return stacks[index];
}

void run_thread() {
  (*body)();
  Thread* thread = current;
  Cta& cta = *thread->cta;
  if (thread->open != nullptr) fail("a thread exits with a store that is not committed");
  for (const auto& group : thread->committed) {
    if (group->outstanding > 0) fail("a thread exits while its stores read shared memory");
  }
  --cta.live;
  if (cta.exited() && cta.events_to_it > 0) fail("a CTA exits with %d events under way to it", cta.events_to_it);
  thread->done = true;
  thread->fiber.suspend();
}

void prepare_cta(Cta& cta, int threads, int shared_bytes, Cluster* cluster) {
  cta.rank = cta.index % cluster_size;
  cta.cluster = cluster;
  cluster->size += threads;
  cta.shared_bytes = shared_bytes;
  cta.shared = {static_cast<uint8_t*>(aligned_alloc(1024, kSharedAllocation)), free};
  memset(cta.shared.get(), 0x7B, kSharedAllocation);
  cta.warps.resize(threads / 32);
  cta.live = threads;
  for (int i = 0; i < threads; ++i) {
    cta.threads.push_back(std::make_unique<Thread>());
    Thread& thread = *cta.threads.back();
    thread.cta = &cta;
    thread.index = i;
    const int place = cta.index * threads + i;
    thread.fiber.prepare(stack_of(place), place, run_thread);
    enqueue(&thread);
  }
}

void check_end(const Cta& cta) {
  for (const auto& [address, barrier] : cta.barriers) {
    if (barrier.pending != barrier.count || barrier.bytes != 0)
      fail("barrier %x of CTA %d is left in the middle of a phase", address, cta.index);
  }
  for (const Meeting& meeting : cta.named) {
    if (meeting.arrived > 0) fail("threads of CTA %d are left at a named barrier", cta.index);
  }
  for (const Warp& warp : cta.warps) {
    if (!warp.multiplications.empty()) fail("wgmma of CTA %d are left", cta.index);
  }
}

}  // namespace

Warp& Thread::warp() { return cta->warps[index / 32]; }

void launch(int grid, int threads, int shared_bytes, int size, const std::function<void()>& kernel) {
  if (grid < 1 || size < 1 || grid % size != 0) fail("a grid of %d CTAs in clusters of %d", grid, size);
  if (shared_bytes > kSharedLimit) fail("%d bytes of shared memory", shared_bytes);
  body = &kernel;
  cluster_size = size;
  reset_scheduler();
  fg::gridDim = dim3(grid);
  std::vector<Cluster> clusters(grid / size);
  std::vector<std::unique_ptr<Cta>> ctas;
  std::vector<Cta*> places;
  for (int i = 0; i < grid; ++i) {
    ctas.push_back(std::make_unique<Cta>());
    ctas.back()->index = i;
    places.push_back(ctas.back().get());
  }
  for (Cta* cta : places) {
    cta->peers = &places[cta->index / size * size];
    prepare_cta(*cta, threads, shared_bytes, &clusters[cta->index / size]);
  }
  run_until_done(grid, grid * threads);
  for (const Cta* cta : places) check_end(*cta);
}

Cta& cta_at(uint32_t address) {
  const uint32_t rank = address >> kRankShift;
  if (rank >= static_cast<uint32_t>(cluster_size)) fail("address %x of CTA %u of its cluster", address, rank);
  return *current->cta->peers[rank];
}

uint8_t* shared_at(Cta& cta, uint32_t address, uint32_t bytes) {
  const uint32_t offset = address & kOffsetMask;
  if (offset < kSharedBase || offset + bytes > kSharedBase + cta.shared_bytes)
    fail("%u bytes at %x are outside the shared memory of CTA %d", bytes, offset, cta.index);
  if (cta.exited()) fail("shared memory of CTA %d, which has exited", cta.index);
  return cta.shared.get() + offset;
}

uint8_t* own_shared(uint32_t address, uint32_t bytes) {
  if (static_cast<int>(address >> kRankShift) != current->cta->rank) fail("address %x is of another CTA", address);
  if (address % bytes != 0) fail("%u bytes at the misaligned address %x", bytes, address);
  return shared_at(*current->cta, address, bytes);
}

uint32_t shared_base() { return kSharedBase | static_cast<uint32_t>(current->cta->rank) << kRankShift; }

int cluster_rank() { return current->cta->rank; }

int cluster_index() { return current->cta->index / cluster_size; }

uint32_t address_in_cta(uint32_t address, uint32_t rank) {
  if (rank >= static_cast<uint32_t>(cluster_size)) fail("mapa to CTA %u of a cluster of %d", rank, cluster_size);
  return (address & kOffsetMask) | rank << kRankShift;
}

}  // namespace emulator

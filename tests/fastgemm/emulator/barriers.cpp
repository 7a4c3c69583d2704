// Where threads meet: mbarriers, named barriers, the cluster barrier and the collective instructions of a warp.
#include "emulator.h"
#include "scheduler.h"

namespace emulator {
namespace {

constexpr long kMaxBytes = (1 << 20) - 1;  // that the transaction count of an mbarrier can hold

Barrier& barrier_at(Cta& cta, uint32_t address) {
  const auto found = cta.barriers.find(address & kOffsetMask);
  if (found == cta.barriers.end()) fail("barrier %x of CTA %d is not initialised", address & kOffsetMask, cta.index);
  return found->second;
}

void end_phase_if_complete(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.count;
  barrier.waiters.wake();
}

void change_bytes(Barrier& barrier, long difference) {
  barrier.bytes += difference;
  if (barrier.bytes > kMaxBytes || barrier.bytes < -kMaxBytes) fail("a barrier expects %ld bytes", barrier.bytes);
}

void arrive(Cta& cta, uint32_t address, uint32_t expected_bytes) {
  Barrier& barrier = barrier_at(cta, address);
  change_bytes(barrier, expected_bytes);
  if (--barrier.pending < 0) fail("too many arrivals at barrier %x of CTA %d", address & kOffsetMask, cta.index);
  end_phase_if_complete(barrier);
}

void meet(Meeting& meeting, int threads) {
  if (++meeting.arrived < threads) {
    meeting.waiters.block();
    return;
  }
  meeting.arrived = 0;
  meeting.waiters.wake();
}

}  // namespace

void complete_bytes(Cta& cta, uint32_t address, uint32_t bytes) {
  Barrier& barrier = barrier_at(cta, address);
  change_bytes(barrier, -static_cast<long>(bytes));
  end_phase_if_complete(barrier);
}

void barrier_init(uint32_t address, uint32_t count) {
  own_shared(address, 8);
  if (count == 0) fail("barrier %x for no arrivals", address & kOffsetMask);
  Barrier& barrier = current->cta->barriers[address & kOffsetMask];
  barrier = Barrier{};
  barrier.count = static_cast<int>(count);
  barrier.pending = barrier.count;
}

void barrier_arrive(uint32_t address, uint32_t expected_bytes) {
  may_switch();
  own_shared(address, 8);
  arrive(*current->cta, address, expected_bytes);
  may_switch();
}

void barrier_arrive_remote(uint32_t address) {
  may_switch();
  Cta& cta = cta_at(address);
  if (&cta == current->cta) {
    arrive(cta, address, 0);
  } else {
    post(cta, kArrival, [&cta, address] { arrive(cta, address, 0); });
  }
  may_switch();
}

void barrier_wait(uint32_t address, uint32_t parity) {
  may_switch();
  own_shared(address, 8);
  Barrier& barrier = barrier_at(*current->cta, address);
  if (parity > 1) fail("parity %u", parity);
  while (barrier.phase == parity) barrier.waiters.block();
  may_switch();
}

void named_barrier_sync(int id, int threads) {
  if (id < 0 || id > 15 || threads % 32 != 0) fail("named barrier %d of %d threads", id, threads);
  may_switch();
  meet(current->cta->named[id], threads);
  may_switch();
}

void cta_sync() { named_barrier_sync(0, static_cast<int>(current->cta->threads.size())); }

// The kernels use the cluster barrier once.
void cluster_arrive() {
  Cluster& cluster = *current->cta->cluster;
  if (cluster.arrived == cluster.size) fail("a second arrival at the cluster barrier");
  if (++cluster.arrived == cluster.size) cluster.waiters.wake();
  may_switch();
}

void cluster_wait() {
  Cluster& cluster = *current->cta->cluster;
  while (cluster.arrived < cluster.size) cluster.waiters.block();
  may_switch();
}

void warp_collective(Collective kind, void* mine, const std::function<void(void* const (&lanes)[32])>& together) {
  Warp& warp = current->warp();
  if (warp.meeting.arrived > 0 && warp.collective != kind) fail("the lanes of a warp are in different instructions");
  warp.collective = kind;
  warp.lanes[current->lane()] = mine;
  if (warp.meeting.arrived == 31) together(warp.lanes);
  meet(warp.meeting, 32);
  may_switch();
}

void warp_sync() {
  warp_collective(kSync, nullptr, [](void* const (&)[32]) {});
}

}  // namespace emulator

// The state of an emulated launch: CTAs with their shared memory and barriers, warps and threads.
#pragma once

#include <stdint.h>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "fiber.h"

namespace emulator {

struct Cta;
struct Thread;

// Threads that wait for something; whoever is woken looks again whether it has happened.
class Waiters {
 public:
  void block();  // the current thread
  void wake();

 private:
  std::vector<Thread*> threads_;
};

struct Barrier {
  int count = 0;      // arrivals of a phase
  int pending = 0;    // of them still to come
  long bytes = 0;     // still to come
  uint32_t phase = 0;
  Waiters waiters;
};

// Threads that meet.
struct Meeting {
  int arrived = 0;
  Waiters waiters;
};

struct Multiplication {
  int group;  // commit group
  std::function<void()> run;
};

struct Warp {
  Meeting meeting;
  int collective = 0;  // which one the lanes that have arrived are in
  void* lanes[32];
  std::deque<Multiplication> multiplications;  // wgmma that have not run
  int committed = 0;                           // groups
  bool scheduled = false;                      // an event will run the first of them
  Waiters waiters;
};

// Tensor stores that one thread has committed together.
struct StoreGroup {
  int outstanding = 0;
};

struct Thread {
  Fiber fiber;
  Cta* cta = nullptr;
  int index = 0;
  bool done = false;
  bool queued = false;  // can run
  std::shared_ptr<StoreGroup> open;
  std::vector<std::shared_ptr<StoreGroup>> committed;
  Waiters stores_read;

  Warp& warp();
  int lane() const { return index % 32; }
};

struct Cluster {
  int size = 0;  // threads
  int arrived = 0;
  Waiters waiters;
};

struct Cta {
  int index = 0, rank = 0;
  Cluster* cluster = nullptr;
  Cta* const* peers = nullptr;  // the CTAs of its cluster
  uint32_t shared_bytes = 0;
  std::unique_ptr<uint8_t, void (*)(void*)> shared{nullptr, nullptr};
  std::map<uint32_t, Barrier> barriers;
  Meeting named[16];
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<Thread>> threads;
  int live = 0;          // threads that have not returned
  int events_to_it = 0;  // under way

  bool exited() const { return live == 0; }
};

extern Thread* current;  // nullptr while events happen
extern int cluster_size;

// Where shared memory begins, aligned less than the kernel needs, and the part of an address that is not the rank.
constexpr uint32_t kSharedBase = 0x400;
constexpr uint32_t kOffsetMask = 0xFFFFFF;
constexpr int kRankShift = 24;

// The CTA of the current thread's cluster that an address lies in.
Cta& cta_at(uint32_t address);

// Checked: `bytes` bytes at an address of `cta`, which has not exited.
uint8_t* shared_at(Cta& cta, uint32_t address, uint32_t bytes);

// Bytes of garbage where data are on their way.
void poison(uint8_t* destination, uint32_t bytes);

// Bytes of a copy have arrived.
void complete_bytes(Cta& cta, uint32_t barrier, uint32_t bytes);

// 128-byte swizzle of an offset: 16-byte chunk c of 128-byte row r lies at c ^ (r % 8).
constexpr uint32_t swizzle(uint32_t offset) { return offset ^ ((offset >> 7 & 7) << 4); }

}  // namespace emulator

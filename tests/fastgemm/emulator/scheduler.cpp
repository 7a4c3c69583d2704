// The random scheduler with starvation, deadlock detection and failure messages.
#include "scheduler.h"

#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "cuda_on_host.h"
#include "emulator.h"

namespace fg {

uint3 threadIdx;
uint3 blockIdx;
dim3 gridDim;

}  // namespace fg

namespace emulator {

Thread* current;

namespace {

struct Event {
  Cta* target;
  EventKind kind;
  std::function<void()> happen;
};

// What does not run as long as anything else can.
enum Starved { kNothing, kCta, kWarpgroup, kWarp, kKind, kKindToCta, kThreads, kEvents };

struct Starvation {
  Starved what = kNothing;
  int cta = 0, warp = 0;
  EventKind kind = kLoad;

  bool holds(const Thread* thread) const {
    switch (what) {
      case kCta:
        return thread->cta->index == cta;
      case kWarpgroup:
        return thread->cta->index == cta && thread->index / 128 == warp / 4;
      case kWarp:
        return thread->cta->index == cta && thread->index / 32 == warp;
      default:
        return what == kThreads;
    }
  }

  bool holds(const Event& event) const {
    switch (what) {
      case kCta:
        return event.target->index == cta;
      case kKind:
        return event.kind == kind;
      case kKindToCta:
        return event.kind == kind && event.target->index == cta;
      default:
        return what == kEvents;
    }
  }
};

std::mt19937_64 generator;
uint64_t switch_mask = 15;
std::string product;
long happened;
Starvation starvation;

// Things that can run, apart from those that are held back.
template <class Item>
struct Pool {
  std::vector<Item> free, held;

  void add(Item item) {
    std::vector<Item>& items = starvation.holds(item) ? held : free;
    items.push_back(std::move(item));
  }

  // After a change of what is starved.
  void sort() {
    std::vector<Item> all = std::move(held);
    held.clear();
    for (Item& item : free) all.push_back(std::move(item));
    free.clear();
    for (Item& item : all) add(std::move(item));
  }

  void clear() {
    free.clear();
    held.clear();
  }

  bool empty() const { return free.empty() && held.empty(); }
};

Pool<Thread*> runnable;
Pool<Event> pending;

template <class Item>
Item take_any(std::vector<Item>& items) {
  std::swap(items[random_below(items.size())], items.back());
  Item item = std::move(items.back());
  items.pop_back();
  return item;
}

// Threads outnumber events by far: three of four choices give both the same chance.
bool choose_event(size_t threads, size_t events) {
  if (threads == 0 || events == 0) return threads == 0;
  if (random_below(4) == 0) return random_below(threads + events) >= threads;
  return random_below(2) == 0;
}

void resume(Thread* thread) {
  thread->queued = false;
  current = thread;
  fg::threadIdx = {static_cast<unsigned>(thread->index), 0, 0};
  fg::blockIdx = {static_cast<unsigned>(thread->cta->index), 0, 0};
  thread->fiber.resume();
  current = nullptr;
}

void happen(const Event& event) {
  if (event.target->exited()) fail("an event reaches CTA %d, which has exited", event.target->index);
  --event.target->events_to_it;
  ++happened;
  event.happen();
}

}  // namespace

void fail(const char* format, ...) {
  char reason[500];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(reason, sizeof reason, format, arguments);
  va_end(arguments);
  printf("FAIL %s: %s", product.c_str(), reason);
  if (current != nullptr) printf(" (CTA %d, thread %d)", current->cta->index, current->index);
  printf("\n");
  fflush(stdout);
  _exit(1);  // fibers hold objects that nobody can destroy any more
}

void set_context(const char* context) { product = context; }

void seed_scheduler(uint64_t seed, int switch_rarity) {
  constexpr uint64_t kOther = 0x5ced01e700000000;  // the products' sizes are drawn from generators of small seeds
  generator.seed(seed ^ kOther);
  switch_mask = (uint64_t{1} << switch_rarity) - 1;
}

long events() { return happened; }

uint32_t random_below(uint32_t bound) { return static_cast<uint32_t>(generator() >> 32) % bound; }

void reset_scheduler() {
  runnable.clear();
  pending.clear();
}

void enqueue(Thread* thread) {
  if (thread->queued) return;
  thread->queued = true;
  runnable.add(thread);
}

void post(Cta& target, EventKind kind, std::function<void()> happen) {
  ++target.events_to_it;
  pending.add(Event{&target, kind, std::move(happen)});
}

void may_switch() {
  if ((generator() & switch_mask) != 0) return;
  enqueue(current);
  current->fiber.suspend();
}

void Waiters::block() {
  threads_.push_back(current);
  current->fiber.suspend();
}

void Waiters::wake() {
  for (Thread* thread : threads_) enqueue(thread);
  threads_.clear();
}

void run_until_done(int ctas, int threads) {
  // Late events are what the kernels must wait for; stores are few, and have a whole tile's time to be in time.
  constexpr Starved kChoices[] = {kNothing, kCta, kWarpgroup, kWarp, kThreads, kEvents, kKind, kKind, kKind, kKindToCta};
  constexpr EventKind kKinds[] = {kArrival, kRemoteStore, kLoad, kWgmma, kStore, kStore, kStore};
  const auto starve = [&] {
    starvation.what = kChoices[random_below(std::size(kChoices))];
    starvation.cta = static_cast<int>(random_below(ctas));
    starvation.warp = static_cast<int>(random_below(12));
    starvation.kind = kKinds[random_below(std::size(kKinds))];
    runnable.sort();
    pending.sort();
  };
  starve();
  const bool changes = random_below(2) != 0;
  const long period = 1l << (8 + random_below(6));
  for (long step = 1; threads > 0; ++step) {
    if (changes && step % period == 0) starve();
    if (runnable.empty() && pending.empty()) fail("deadlock: %d threads wait", threads);
    const bool any_free = !runnable.free.empty() || !pending.free.empty();
    auto& threads_now = any_free ? runnable.free : runnable.held;
    auto& events_now = any_free ? pending.free : pending.held;
    if (choose_event(threads_now.size(), events_now.size())) {
      happen(take_any(events_now));
    } else {
      Thread* thread = take_any(threads_now);
      resume(thread);
      if (thread->done) --threads;
    }
  }
  if (!pending.empty()) fail("events are left after the last thread");
}

}  // namespace emulator

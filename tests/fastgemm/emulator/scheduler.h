// Who runs next: threads and events in random order.
#pragma once

#include <stdint.h>

#include <functional>

#include "machine.h"

namespace emulator {

enum EventKind { kArrival, kRemoteStore, kLoad, kStore, kWgmma };

// Forgets what an earlier launch left.
void reset_scheduler();

void enqueue(Thread* thread);

// `happen` runs later; `target` is the CTA whose shared memory or barriers it uses.
void post(Cta& target, EventKind kind, std::function<void()> happen);

// Until all of `threads` threads of `ctas` CTAs have returned.
void run_until_done(int ctas, int threads);

// Uniform in 0 .. bound - 1, from the scheduler's generator.
uint32_t random_below(uint32_t bound);

}  // namespace emulator

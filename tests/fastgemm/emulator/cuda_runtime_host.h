// What the driver sets on the emulated device and reads from a launch.
#pragma once

#include "cuda_on_host.h"
#include "sm90/config.cuh"

namespace emulator {

void set_multiprocessors(int count);

// The parameters of the last launch.
const fg::sm90::Params& launched_params();

}  // namespace emulator

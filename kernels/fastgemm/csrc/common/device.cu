// Which code the driver chose for the current device, asked of a kernel compiled for the same architectures as others.
#include "device.h"

namespace fg {
namespace {

__global__ void probe() {}

}  // namespace

bool has_dependent_launch() {
  static DeviceCache cache;
  const int answer = cached_for_device(cache, [](int) {
    cudaFuncAttributes attributes{};
    const cudaError_t status = cudaFuncGetAttributes(&attributes, probe);
    if (status != cudaSuccess) return -static_cast<int>(status);
    return attributes.ptxVersion >= 90 ? 1 : 0;
  });
  return answer == 1;
}

}  // namespace fg

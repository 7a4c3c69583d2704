// What the host code asks about the current device; answers are cached for each device.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

namespace fg {

constexpr int kMaxCachedDevices = 64;
using DeviceCache = std::atomic<int>[kMaxCachedDevices];

// query(device) of the current device; answers of 0 and more are remembered.  Negative: -cudaError_t.
template <typename Query>
int cached_for_device(DeviceCache& cache, Query query) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return -static_cast<int>(status);
  if (device >= kMaxCachedDevices) return query(device);
  const int known = cache[device].load(std::memory_order_relaxed);  // answer + 1
  if (known > 0) return known - 1;
  const int answer = query(device);
  if (answer >= 0) cache[device].store(answer + 1, std::memory_order_relaxed);
  return answer;
}

// An attribute of the current device; negative: -cudaError_t.
template <cudaDeviceAttr kAttribute>
int device_attribute() {
  static DeviceCache cache;
  return cached_for_device(cache, [](int device) {
    int value = 0;
    const cudaError_t status = cudaDeviceGetAttribute(&value, kAttribute, device);
    return status == cudaSuccess ? value : -static_cast<int>(status);
  });
}

// Compute capability as 10 * major + minor; negative: -cudaError_t.
inline int device_arch() {
  const int major = device_attribute<cudaDevAttrComputeCapabilityMajor>();
  const int minor = device_attribute<cudaDevAttrComputeCapabilityMinor>();
  return major < 0 ? major : minor < 0 ? minor : 10 * major + minor;
}

inline int device_multiprocessors() { return device_attribute<cudaDevAttrMultiProcessorCount>(); }

// Shared memory a block may ask for.
inline int device_shared_bytes() { return device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(); }

// Whether the kernels run as code that knows programmatic dependent launch and clusters (sm_90 and newer). A kernel
// without griddepcontrol.wait must not be launched ahead of the one before it.
bool has_dependent_launch();

}  // namespace fg

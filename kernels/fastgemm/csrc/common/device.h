// What the host code asks about the current device; answers are cached for each device.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

namespace fg {

constexpr int kMaxCachedDevices = 64;
using DeviceCache = std::atomic<int>[kMaxCachedDevices];

// query(device) of the current device; positive answers are remembered.  Negative: -cudaError_t.
template <typename Query>
int cached_for_device(DeviceCache& cache, Query query) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return -static_cast<int>(status);
  if (device >= kMaxCachedDevices) return query(device);
  int known = cache[device].load(std::memory_order_relaxed);
  if (known > 0) return known;
  known = query(device);
  if (known > 0) cache[device].store(known, std::memory_order_relaxed);
  return known;
}

// Compute capability as 10 * major + minor; negative: -cudaError_t.
inline int device_arch() {
  static DeviceCache cache;
  return cached_for_device(cache, [](int device) {
    int major = 0, minor = 0;
    cudaError_t status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    return status == cudaSuccess ? 10 * major + minor : -static_cast<int>(status);
  });
}

// Number of multiprocessors; negative: -cudaError_t.
inline int device_multiprocessors() {
  static DeviceCache cache;
  return cached_for_device(cache, [](int device) {
    int count = 0;
    const cudaError_t status = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return status == cudaSuccess ? count : -static_cast<int>(status);
  });
}

// Whether the kernels run as code that knows programmatic dependent launch and clusters (sm_90 and newer). A kernel
// without griddepcontrol.wait must not be launched ahead of the one before it.
bool has_dependent_launch();

}  // namespace fg

// Kernel launch with programmatic dependent launch and clusters where the device has them.
#pragma once

#include <cuda_runtime.h>

#include "../fastgemm.h"
#include "device.h"

namespace fg {

struct LaunchShape {
  dim3 grid;
  unsigned threads;
  size_t shared_bytes = 0;
  unsigned cluster = 1;  // blocks along x; more than 1 needs has_dependent_launch()
};

// Every kernel launched here must execute grid_dependency_wait() before it reads what an earlier kernel may have
// written, and before it writes anything.
template <typename... Parameters, typename... Arguments>
int launch_kernel(void (*kernel)(Parameters...), const LaunchShape& shape, void* stream, Arguments... arguments) {
  cudaError_t status = cudaSuccess;
  if (shape.shared_bytes > 48 * 1024)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shape.shared_bytes));
  if (status != cudaSuccess) return FG_ERROR_CUDA + static_cast<int>(status);
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (has_dependent_launch()) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {shape.cluster, 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = count;
  status = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  return status == cudaSuccess ? FG_OK : FG_ERROR_CUDA + static_cast<int>(status);
}

}  // namespace fg

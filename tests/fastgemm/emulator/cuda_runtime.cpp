// The parts of the CUDA runtime and driver that launch() uses: a device whose number is that of its multiprocessors, so that
// what the host code remembers for each device fits, and launches that run on the emulator.
#include "cuda_runtime_host.h"

#include <string.h>

#include "cuda_on_host.h"
#include "sm90/tensor_map.h"

namespace fg::sm90 {

uint8_t shared_memory[1];

// In place of tensor_map.cu, which asks the driver; with the conditions that the driver checks.
int encode_tensor_map(CUtensorMap* map, const void* base, CUtensorMapDataType, int element_bytes, int64_t rows,
                      int64_t columns, int box_rows, int box_columns, CUtensorMapSwizzle swizzle) {
  constexpr int kMaxBox = 256;
  const bool swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  if (box_rows > kMaxBox || box_columns > kMaxBox) emulator::fail("a box of %d x %d", box_rows, box_columns);
  if (swizzled && box_columns * element_bytes != 128) emulator::fail("a swizzled box of %d columns", box_columns);
  if (columns * element_bytes % 16 != 0) emulator::fail("rows of %ld elements", static_cast<long>(columns));
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0) emulator::fail("a matrix that is not aligned");
  emulator::TensorMap encoded{};
  encoded.base = static_cast<uint8_t*>(const_cast<void*>(base));
  encoded.element_bytes = element_bytes;
  encoded.rows = rows;
  encoded.columns = columns;
  encoded.box_rows = box_rows;
  encoded.box_columns = box_columns;
  encoded.swizzled = swizzled;
  static_assert(sizeof encoded <= sizeof *map, "");
  memcpy(map, &encoded, sizeof encoded);
  return 0;
}

}  // namespace fg::sm90

namespace emulator {
namespace {

int multiprocessors = 1;
fg::sm90::Params launched;

int cluster_size_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) return config.attrs[i].val.clusterDim.x;
  }
  return 1;
}

}  // namespace

void set_multiprocessors(int count) { multiprocessors = count; }

const fg::sm90::Params& launched_params() { return launched; }

}  // namespace emulator

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = emulator::multiprocessors;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (attribute != cudaDevAttrMultiProcessorCount) emulator::fail("device attribute %d", attribute);
  *value = device;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
  const int count = emulator::multiprocessors / emulator::cluster_size_of(*config);
  *clusters = count > 0 ? count : 1;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  using Kernel = void (*)(fg::sm90::Params, CUtensorMap, CUtensorMap, CUtensorMap);
  const Kernel kernel = reinterpret_cast<Kernel>(const_cast<void*>(function));
  const auto& params = *static_cast<const fg::sm90::Params*>(arguments[0]);
  const auto map = [&](int index) { return *static_cast<const CUtensorMap*>(arguments[index]); };
  const CUtensorMap x = map(1);
  const CUtensorMap w = map(2);
  const CUtensorMap out = map(3);
  emulator::launched = params;
  emulator::launch(config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes, emulator::cluster_size_of(*config),
                   [&] { kernel(params, x, w, out); });
  return cudaSuccess;
}

}  // extern "C"

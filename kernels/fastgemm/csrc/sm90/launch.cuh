// Host side of one GEMM kernel instance: tensor maps, launch parameters, cluster launch.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "../common/gemm_args.h"
#include "gemm_kernel.cuh"
#include "plan.h"
#include "tensor_map.h"

namespace fg::sm90 {

constexpr int kMaxDevices = 64;

inline int cuda_code(cudaError_t status) { return status == cudaSuccess ? FG_OK : FG_ERROR_CUDA + status; }

// Multiprocessors of the current device.
inline int multiprocessors(int* count) {
  static std::atomic<int> cache[kMaxDevices];
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return cuda_code(status);
  if (device < kMaxDevices) *count = cache[device].load(std::memory_order_relaxed);
  if (device < kMaxDevices && *count != 0) return FG_OK;
  status = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess && device < kMaxDevices) cache[device].store(*count, std::memory_order_relaxed);
  return cuda_code(status);
}

// Clusters of `size` CTAs that the current device can hold at once; prepares the kernel on first use of a device.
template <class C>
int resident_clusters(int device, int size, int* clusters) {
  static std::atomic<int> cache[kMaxDevices][9];
  if (device < kMaxDevices) {
    *clusters = cache[device][size].load(std::memory_order_acquire);
    if (*clusters != 0) return FG_OK;
  }
  cudaError_t status =
      cudaFuncSetAttribute(gemm_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedLimit);
  if (status != cudaSuccess) return cuda_code(status);
  int count = 0;
  if (size == 1) {
    status = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  } else {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(size);
    config.blockDim = dim3(C::kThreads);
    config.dynamicSmemBytes = kSharedLimit;
    config.attrs = &attribute;
    config.numAttrs = 1;
    status = cudaOccupancyMaxActiveClusters(&count, gemm_kernel<C>, &config);
  }
  if (status != cudaSuccess) return cuda_code(status);
  if (count < 1) return FG_ERROR_CUDA + cudaErrorLaunchOutOfResources;
  *clusters = count;
  if (device < kMaxDevices) cache[device][size].store(count, std::memory_order_release);
  return FG_OK;
}

// The operands of ZeroPointConfig that GemmArgs has no place for.
struct Extra {
  const uint8_t* zero = nullptr;
  const int32_t* x_sum = nullptr;
};

template <class C>
int launch(const GemmArgs& a, const Plan& plan, const Extra& extra) {
  const int k_steps = static_cast<int>((a.k + C::kStepK - 1) / C::kStepK);
  const bool shares = plan.share == kShareTokens ? C::kShares : plan.share == kShareWeights && C::kSharesWeights;
  int split = shares ? 1 : plan.split;
  while (split > k_steps) split = split == 3 ? 2 : split / 2;  // every CTA of a cluster multiplies
  const int cluster = shares ? 2 : split;
  int device = 0, clusters = 0;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return cuda_code(status);
  int code = resident_clusters<C>(device, cluster, &clusters);
  if (code != FG_OK) return code;

  Params p{};
  p.x_scale = a.x_scale;
  p.w_scale = a.w_scale;
  p.bias = a.bias;
  p.out = a.out;
  p.m = static_cast<int>(a.m);
  p.n = static_cast<int>(a.n);
  p.k_blocks = static_cast<int>((a.k + 63) / 64);
  p.k_steps = k_steps;
  p.row_blocks = static_cast<int>((a.n + 63) / 64);
  p.share = shares ? plan.share : kShareNothing;
  const int row_tiles = static_cast<int>((a.n + C::kRows - 1) / C::kRows);
  const int token_tiles = static_cast<int>((a.m + C::kTokens - 1) / C::kTokens);
  p.row_units = p.share == kShareTokens ? (row_tiles + 1) / 2 : row_tiles;
  p.token_units = p.share == kShareWeights ? (token_tiles + 1) / 2 : token_tiles;
  const int groups = (p.token_units + plan.group - 1) / plan.group;
  p.group = (p.token_units + groups - 1) / groups;
  const int64_t tiles = static_cast<int64_t>(p.row_units) * p.token_units * (shares ? 2 : 1);
  const int64_t wave = static_cast<int64_t>(clusters) * cluster;
  p.tiles = static_cast<int>(tiles);
  p.split = split;
  for (int rank = 0; rank <= split; ++rank) p.share_steps[rank] = k_steps * rank / split;
  p.whole_tiles = static_cast<int>(split == 1 ? tiles : tiles / wave * wave);
  const int64_t grid = tiles * split < wave ? tiles * split : wave;
  p.clusters = static_cast<int>(grid / cluster);
  const bool tensor_store = C::kTensorStore && p.whole_tiles > 0;
  p.stages = pipeline_stages<C>(split, tensor_store);
  p.out_dtype = a.out_dtype;
  p.stream_weights = p.token_units <= p.group;
  p.weights_ready = a.weights_ready;
  p.zero = extra.zero;
  p.x_sum = extra.x_sum;
  p.ahead_steps = p.stages;
  if (!a.weights_ready && p.ahead_steps > C::kPrefetchBytes / C::kWeightBytes)
    p.ahead_steps = C::kPrefetchBytes / C::kWeightBytes;

  CUtensorMap x_map{}, w_map{}, out_map{};
  const int x_rows = p.share == kShareTokens ? C::kTokens / 2 : C::kTokens;
  code = encode_tensor_map(&x_map, a.x, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, a.m, a.k, x_rows, kBoxK);
  if (code == FG_OK && C::kInt4) {
    code = encode_tensor_map(&w_map, a.w, CU_TENSOR_MAP_DATA_TYPE_FLOAT64, 8, int64_t{p.row_blocks} * p.k_blocks,
                             kPackedTile / 8, C::kStepK / 64, kPackedTile / 8, CU_TENSOR_MAP_SWIZZLE_NONE);
  } else if (code == FG_OK) {
    const int w_rows = p.share == kShareWeights ? C::kRows / 2 : C::kRows;
    code = encode_tensor_map(&w_map, a.w, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, a.n, a.k, w_rows, kBoxK);
  }
  if (code == FG_OK && tensor_store) {
    const bool wide = a.out_dtype == FG_I32 || a.out_dtype == FG_F32;
    code = encode_tensor_map(&out_map, a.out, wide ? CU_TENSOR_MAP_DATA_TYPE_UINT32 : CU_TENSOR_MAP_DATA_TYPE_UINT16,
                             wide ? 4 : 2, a.m, a.n, C::kStoreTokens, wide ? 32 : 64);
  }
  if (code != FG_OK) return code;

  cudaLaunchAttribute attributes[2] = {};
  int count = 0;
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  // The kernel itself waits for the preceding one, after its own set-up.
  attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(C::kThreads);
  config.dynamicSmemBytes = shared_layout<C>(p.stages, p.split, tensor_store).total;
  config.stream = a.stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cuda_code(cudaLaunchKernelEx(&config, gemm_kernel<C>, p, x_map, w_map, out_map));
}

}  // namespace fg::sm90

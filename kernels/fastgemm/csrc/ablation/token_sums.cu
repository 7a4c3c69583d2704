// Sums of the tokens' values, as a kernel of its own: a quantizer would write them with the scales.
#include "prepare.h"

namespace fg {
namespace ablation {
namespace {

constexpr int kThreads = 256;
constexpr int kTokens = kThreads / 32;  // of a block

__global__ void __launch_bounds__(kThreads) sum(const int8_t* x, int32_t* sums, int64_t m, int64_t k) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kTokens + threadIdx.x / 32;
  if (token >= m) return;
  const int4* row = reinterpret_cast<const int4*>(x + token * k);
  int total = 0;
  for (int64_t i = threadIdx.x % 32; i < k / 16; i += 32) {
    const int4 v = row[i];
    total = __dp4a(v.x, 0x01010101, total);
    total = __dp4a(v.y, 0x01010101, total);
    total = __dp4a(v.z, 0x01010101, total);
    total = __dp4a(v.w, 0x01010101, total);
  }
  total = __reduce_add_sync(0xffffffffu, total);
  if (threadIdx.x % 32 == 0) sums[token] = total;
}

}  // namespace

int token_sums(const int8_t* x, int32_t* sums, int64_t m, int64_t k, cudaStream_t stream) {
  sum<<<static_cast<unsigned>((m + kTokens - 1) / kTokens), kThreads, 0, stream>>>(x, sums, m, k);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? FG_OK : FG_ERROR_CUDA + static_cast<int>(status);
}

}  // namespace ablation
}  // namespace fg

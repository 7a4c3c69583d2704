// Adds the partial sums of a GEMM whose k range was split over blocks.
#include "split_k.h"

namespace fg {
namespace sm80 {
namespace {

constexpr int kThreads = 256;

// Adds the partial sums of `splits` blocks and finishes the output; one thread for eight neighbouring columns.
__global__ void __launch_bounds__(kThreads)
    add_partial_sums(const int32_t* partial, int splits, int64_t m, const Epilogue epilogue) {
  const int64_t pieces = m * (epilogue.n / 8);
  const int64_t piece = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (piece >= pieces) return;
  int32_t sum[8] = {};
  for (int s = 0; s < splits; ++s) {
    const int4* source = reinterpret_cast<const int4*>(partial + s * m * epilogue.n + piece * 8);
    const int4 low = source[0], high = source[1];
    const int32_t values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i)
      sum[i] = epilogue.float_sums ? __float_as_int(__int_as_float(sum[i]) + __int_as_float(values[i]))
                                   : sum[i] + values[i];
  }
  store8(epilogue, piece * 8 / epilogue.n, piece * 8 % epilogue.n, sum);
}

}  // namespace

cudaError_t add_splits(const int32_t* partial, int splits, int64_t m, const Epilogue& epilogue, cudaStream_t stream) {
  const int64_t pieces = m * (epilogue.n / 8);
  const unsigned blocks = static_cast<unsigned>((pieces + kThreads - 1) / kThreads);
  add_partial_sums<<<blocks, kThreads, 0, stream>>>(partial, splits, m, epilogue);
  return cudaGetLastError();
}

}  // namespace sm80
}  // namespace fg

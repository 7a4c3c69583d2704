// Checked arguments of one GEMM launch, and the entry points of the architecture paths.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "../fastgemm.h"

namespace fg {

struct GemmArgs {
  const int8_t* x;       // [M, K]
  const float* x_scale;  // [M]
  const void* w;         // packed W4 layout v1, or int8 [N, K]
  const float* w_scale;  // [N]
  const void* bias;      // [N] of out_dtype, or nullptr
  void* out;             // [M, N]
  int64_t m, n, k;
  int out_dtype;
  void* workspace;
  int64_t workspace_bytes;
  cudaStream_t stream;
  bool weights_ready;  // the preceding kernel of the stream does not write w
};

// Each returns an FG_* code.  m >= 1 is guaranteed; everything else has been checked by the caller.
namespace sm90 {
int w4a8(const GemmArgs& args);
int w8a8(const GemmArgs& args);
int64_t workspace_bytes(int kind, int64_t m, int64_t n, int64_t k);
}  // namespace sm90

namespace sm80 {
int w4a8(const GemmArgs& args);
int w8a8(const GemmArgs& args);
int64_t workspace_bytes(int kind, int64_t m, int64_t n, int64_t k);
}  // namespace sm80

}  // namespace fg

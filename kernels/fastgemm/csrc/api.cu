// C entry points of the GEMMs: argument checks and the choice of the architecture path.
#include "common/gemm_args.h"
#include "common/path.h"
#include "fastgemm.h"

namespace {

constexpr int64_t kMaxTokens = 65536;
// |x * 16 w| <= 128 * 128, so an int32 accumulator is exact for K < 2^31 / 2^14 = 131072.
constexpr int64_t kMaxReduction = 131040;

bool aligned(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

int check(const fg::GemmArgs& a) {
  if (a.m < 0 || a.m > kMaxTokens || a.n <= 0 || a.n % 16 != 0 || a.n > INT32_MAX || a.k <= 0 || a.k % 32 != 0 ||
      a.k > kMaxReduction)
    return FG_ERROR_SIZE;
  if (a.out_dtype != FG_F16 && a.out_dtype != FG_BF16 && a.out_dtype != FG_I32 && a.out_dtype != FG_F32)
    return FG_ERROR_DTYPE;
  if (a.m == 0) return FG_OK;
  const bool scaled = a.out_dtype != FG_I32;
  if (!a.x || !a.w || !a.out || (scaled && (!a.x_scale || !a.w_scale))) return FG_ERROR_NULL_POINTER;
  if (!aligned(a.x, 16) || !aligned(a.w, 16) || !aligned(a.out, 16) || !aligned(a.bias, 16) ||
      !aligned(a.x_scale, 4) || !aligned(a.w_scale, 4))
    return FG_ERROR_ALIGNMENT;
  return FG_OK;
}

int run(int kind, fg::GemmArgs a, int arch) {
  int code = check(a);
  if (code != FG_OK || a.m == 0) return code;
  a.weights_ready = (arch & FG_WEIGHTS_READY) != 0;
  const int path = fg::choose_path(arch & ~FG_WEIGHTS_READY, &code);
  if (path == 0) return code;
  if (a.out_dtype == FG_I32) a.bias = nullptr;
  if (path == 90) {
    if (a.workspace_bytes < fg::sm90::workspace_bytes(kind, a.m, a.n, a.k)) return FG_ERROR_WORKSPACE;
    return kind == FG_W4A8 ? fg::sm90::w4a8(a) : fg::sm90::w8a8(a);
  }
  if (a.workspace_bytes < fg::sm80::workspace_bytes(kind, a.m, a.n, a.k)) return FG_ERROR_WORKSPACE;
  return kind == FG_W4A8 ? fg::sm80::w4a8(a) : fg::sm80::w8a8(a);
}

}  // namespace

extern "C" {

int fg_w4a8_gemm(const int8_t* x, const float* x_scale, const uint8_t* w_packed, const float* w_scale,
                 const void* bias, void* out, int64_t m, int64_t n, int64_t k, int out_dtype, void* workspace,
                 int64_t workspace_bytes, int arch, void* stream) {
  return run(FG_W4A8,
             fg::GemmArgs{x, x_scale, w_packed, w_scale, bias, out, m, n, k, out_dtype, workspace, workspace_bytes,
                          static_cast<cudaStream_t>(stream), false},
             arch);
}

int fg_w8a8_gemm(const int8_t* x, const float* x_scale, const int8_t* w, const float* w_scale, const void* bias,
                 void* out, int64_t m, int64_t n, int64_t k, int out_dtype, void* workspace, int64_t workspace_bytes,
                 int arch, void* stream) {
  return run(FG_W8A8,
             fg::GemmArgs{x, x_scale, w, w_scale, bias, out, m, n, k, out_dtype, workspace, workspace_bytes,
                          static_cast<cudaStream_t>(stream), false},
             arch);
}

int64_t fg_gemm_workspace_bytes(int kind, int64_t m, int64_t n, int64_t k, int arch) {
  if (m <= 0 || n <= 0 || k <= 0) return 0;
  int error = FG_OK;
  const int path = fg::choose_path(arch & ~FG_WEIGHTS_READY, &error);
  if (path == 0) return 0;
  return path == 90 ? fg::sm90::workspace_bytes(kind, m, n, k) : fg::sm80::workspace_bytes(kind, m, n, k);
}

const char* fg_error_string(int code) {
  switch (code) {
    case FG_OK: return "success";
    case FG_ERROR_NULL_POINTER: return "a required pointer is NULL";
    case FG_ERROR_SIZE:
      return "sizes out of range (products: M 0..65536, N a multiple of 16, K a multiple of 32 and at most 131040; "
             "attention: head_dim 64 or 128, num_heads a multiple of kv_heads)";
    case FG_ERROR_DTYPE: return "unknown data type code";
    case FG_ERROR_ALIGNMENT: return "a pointer is not aligned (tensors 16 bytes, scales 4 bytes)";
    case FG_ERROR_ARCH: return "the requested kernel path is not available on this device";
    case FG_ERROR_WORKSPACE: return "workspace is smaller than fg_gemm_workspace_bytes()";
    case FG_ERROR_DRIVER: return "the driver refused the tensor map";
    default: break;
  }
  if (code > FG_ERROR_CUDA) return cudaGetErrorString(static_cast<cudaError_t>(code - FG_ERROR_CUDA));
  return "unknown error code";
}

}  // extern "C"

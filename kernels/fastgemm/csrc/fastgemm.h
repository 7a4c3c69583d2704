// C ABI of FastGEMM: W4A8 and W8A8 matrix products and the activation kernels around them.
//
// Every function takes raw device pointers, int64 sizes and a CUDA stream, returns an error code (FG_OK = 0), allocates
// nothing, prints nothing, never uses the default stream by itself, and can be captured in a CUDA graph.
// All tensors are contiguous and row-major unless said otherwise; device pointers must be 16-byte aligned
// (scales: 4-byte aligned).
#ifndef FASTGEMM_H_
#define FASTGEMM_H_

#include <stdint.h>

#if defined(_WIN32)
#define FG_API
#else
#define FG_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Output and activation types.  FG_I32 returns the raw accumulator sum_k x*w; scales and bias are then ignored.
enum { FG_F16 = 0, FG_BF16 = 1, FG_I32 = 2, FG_F32 = 3 };

enum { FG_W4A8 = 0, FG_W8A8 = 1 };

// May be added to `arch` of a GEMM call: no kernel of the stream that may still be running writes w, so the loads of w
// may begin before the preceding kernel has finished.  That one may itself have been launched ahead of its predecessor
// (every kernel here may), so "w was written two calls ago" is not enough; weights that never change are.
// Only loads of w are affected; everything else waits for the preceding kernel.
enum { FG_WEIGHTS_READY = 0x100 };

enum {
  FG_OK = 0,
  FG_ERROR_NULL_POINTER = 1,
  FG_ERROR_SIZE = 2,          // negative size, M > 65536, N not a multiple of 16, K not a multiple of 32 or too large
  FG_ERROR_DTYPE = 3,
  FG_ERROR_ALIGNMENT = 4,
  FG_ERROR_ARCH = 5,          // the requested path does not exist on this device
  FG_ERROR_WORKSPACE = 6,     // workspace smaller than fg_gemm_workspace_bytes() says
  FG_ERROR_DRIVER = 7,        // the driver refused a tensor map
  FG_ERROR_CUDA = 1000,       // FG_ERROR_CUDA + cudaError_t
};

// out[M, N] = diag(x_scale) * (x int8 [M, K]) * (w int4 [N, K])^T * diag(w_scale) + bias.
//   w_packed: packed W4 layout v1, uint8 [ceil(N/64), ceil(K/64), 2048]
//   bias:     [N] in out_dtype, or NULL
//   arch:     0 = the device's best path, 80 = mma.sync, 90 = wgmma (needs compute capability 9.0); plus FG_WEIGHTS_READY
// M in 0..65536, N a multiple of 16, K a multiple of 32.
FG_API int fg_w4a8_gemm(const int8_t* x, const float* x_scale, const uint8_t* w_packed, const float* w_scale,
                        const void* bias, void* out, int64_t m, int64_t n, int64_t k, int out_dtype,
                        void* workspace, int64_t workspace_bytes, int arch, void* stream);

// As fg_w4a8_gemm with w int8 [N, K].
FG_API int fg_w8a8_gemm(const int8_t* x, const float* x_scale, const int8_t* w, const float* w_scale,
                        const void* bias, void* out, int64_t m, int64_t n, int64_t k, int out_dtype,
                        void* workspace, int64_t workspace_bytes, int arch, void* stream);

// Bytes of workspace a GEMM call needs (kind: FG_W4A8 or FG_W8A8); its contents need no initialisation.
FG_API int64_t fg_gemm_workspace_bytes(int kind, int64_t m, int64_t n, int64_t k, int arch);

// q[M, K] int8 and scale[M] of per-token symmetric quantization of x[M, K] (FG_F16, FG_BF16 or FG_F32).
FG_API int fg_quantize_per_token(const void* x, int in_dtype, int8_t* q, float* scale, int64_t m, int64_t k,
                                 void* stream);

// h = x (+ residual); y = h * rsqrt(mean(h^2) + eps) * weight; (q, scale) = per-token quantization of y.
// residual and residual_out (receives h) may be NULL.
FG_API int fg_rms_norm_quant(const void* x, const void* residual_or_null, const void* weight, float eps, int in_dtype,
                             void* residual_out_or_null, int8_t* q, float* scale, int64_t m, int64_t k, void* stream);

// (q, scale) = per-token quantization of silu(gate) * up, gate_up[M, 2*I] with the gate half first.
FG_API int fg_silu_mul_quant(const void* gate_up, int in_dtype, int8_t* q, float* scale, int64_t m, int64_t i,
                             void* stream);

// y = RMSNorm of x (+ residual) as in fg_rms_norm_quant, in the dtype of x and not quantized.
FG_API int fg_rms_norm(const void* x, const void* residual_or_null, const void* weight, float eps, int dtype,
                       void* residual_out_or_null, void* y, int64_t m, int64_t k, void* stream);

// y[M, I] = silu(gate) * up as in fg_silu_mul_quant, not quantized.
FG_API int fg_silu_mul(const void* gate_up, int dtype, void* y, int64_t m, int64_t i, void* stream);

// Rotary embedding of the queries and keys of `tokens` tokens; keys and values go into the caches at sequence rows[t],
// position positions[t].  FG_F16 or FG_BF16, head_dim 64 or 128.
//   qkv:     [tokens, (num_heads + 2 * kv_heads) * head_dim], queries, keys, values
//   cos_sin: [at least max_len, head_dim], cos of the head_dim / 2 angles, then sin
//   caches:  [batch, kv_heads, max_len, head_dim];  q: [tokens, num_heads, head_dim]
// A token outside the caches is not stored, and its queries become NaN.
FG_API int fg_rope_append(const void* qkv, const float* cos_sin, const int32_t* positions, const int32_t* rows,
                          void* k_cache, void* v_cache, void* q, int dtype, int64_t tokens, int64_t num_heads,
                          int64_t kv_heads, int64_t head_dim, int64_t max_len, int64_t batch, void* stream);

// One decoded token of each sequence: rotary embedding, append at position lengths[b], attention to the positions
// 0..lengths[b], or to the last `window` of them (0: all).  The arrays are as in fg_rope_append with tokens = batch.
//   out:    [batch, num_heads * head_dim] in dtype; with scale [batch], int8 and per-token quantized
//   splits: blocks that share the positions of a head, up to 64 (0: chosen from the sizes)
//   cache_ready: not 0: no kernel of the stream that may still be running writes the caches (as FG_WEIGHTS_READY), so that
//     the loads of earlier positions begin before the preceding kernel has finished
// A length outside 0..max_len - 1 stores nothing and makes the token's output NaN (its scale, if quantized).
FG_API int fg_decode_attention(const void* qkv, const float* cos_sin, const int32_t* lengths, void* k_cache,
                               void* v_cache, float softmax_scale, int dtype, void* out, float* scale_or_null,
                               int64_t batch, int64_t num_heads, int64_t kv_heads, int64_t head_dim, int64_t max_len,
                               int64_t window, int splits, int cache_ready, void* workspace,
                               int64_t workspace_bytes, void* stream);

// Bytes of workspace fg_decode_attention needs; its contents need no initialisation.
FG_API int64_t fg_decode_attention_workspace_bytes(int64_t batch, int64_t num_heads, int64_t kv_heads, int64_t head_dim,
                                                   int64_t max_len, int64_t window, int splits);

FG_API const char* fg_error_string(int code);

#ifdef __cplusplus
}
#endif

#endif  // FASTGEMM_H_

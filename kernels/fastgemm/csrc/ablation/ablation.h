// Products that FastGEMM is compared with (OdysseyLLM, section 4.4): what fine-grained scales, zero points and a
// separate unpacking step cost.  They run on mma.sync on every architecture: compare with fg_w4a8_gemm at arch 80.
#ifndef FASTGEMM_ABLATION_H_
#define FASTGEMM_ABLATION_H_

#include "../fastgemm.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { FG_ABLATION_GROUPED = 0, FG_ABLATION_ASYMMETRIC = 1 };

// Symmetric int4 with group_scale[K / 128, N]: each group's int32 sum is scaled and added in fp32.  K % 128 == 0;
// out_dtype is not FG_I32.
FG_API int fg_ablation_grouped_gemm(const int8_t* x, const float* x_scale, const uint8_t* w_packed,
                                    const float* group_scale, void* out, int64_t m, int64_t n, int64_t k,
                                    int out_dtype, void* workspace, int64_t workspace_bytes, void* stream);

// Unsigned int4 (the nibbles of the packed layout are 0..15) with w_scale[N] and w_zero[N] in 0..15.
FG_API int fg_ablation_asymmetric_gemm(const int8_t* x, const float* x_scale, const uint8_t* w_packed,
                                       const float* w_scale, const uint8_t* w_zero, void* out, int64_t m, int64_t n,
                                       int64_t k, int out_dtype, void* workspace, int64_t workspace_bytes,
                                       void* stream);

FG_API int64_t fg_ablation_workspace_bytes(int kind, int64_t m, int64_t n, int64_t k);

// w[N, K] int8 of a packed int4 weight.
FG_API int fg_ablation_unpack(const uint8_t* w_packed, int8_t* w, int64_t n, int64_t k, void* stream);

#ifdef __cplusplus
}
#endif

#endif  // FASTGEMM_ABLATION_H_

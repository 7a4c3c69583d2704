// Products that FastGEMM is compared with (OdysseyLLM, section 4.4): what fine-grained scales, zero points and a
// separate unpacking step cost.  They run in the same kernels as fg_w4a8_gemm, chosen by `arch` in the same way: compare
// with it at the same arch.
#ifndef FASTGEMM_ABLATION_H_
#define FASTGEMM_ABLATION_H_

#include "../fastgemm.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { FG_ABLATION_GROUPED = 0, FG_ABLATION_ASYMMETRIC = 1 };

// arch of the products: as that of fg_w4a8_gemm; FG_WEIGHTS_READY then holds for the weight's scales and zero points, too.
// plan: NULL, or {warpgroups, tokens, split} of a wgmma kernel in place of the chosen one, for tests and sweeps;
// FG_ERROR_SIZE if there is none for M tokens, FG_ERROR_ARCH with mma.sync.

// Symmetric int4 with group_scale[K / 128, N], 16-byte aligned: each group's int32 sum is scaled and added in fp32.
// K % 128 == 0; out_dtype is not FG_I32.
FG_API int fg_ablation_grouped_gemm(const int8_t* x, const float* x_scale, const uint8_t* w_packed,
                                    const float* group_scale, void* out, int64_t m, int64_t n, int64_t k,
                                    int out_dtype, void* workspace, int64_t workspace_bytes, int arch, const int* plan,
                                    void* stream);

// Unsigned int4 (the nibbles of the packed layout are 0..15) with w_scale[N] and w_zero[N] in 0..15.
//   x_sum: [M], the sum of each token's values, which a quantizer can give; NULL: a kernel of its own finds it.  Not read
//          by mma.sync, which subtracts the zero point from every weight.
// With wgmma K is at most 65536.
FG_API int fg_ablation_asymmetric_gemm(const int8_t* x, const float* x_scale, const int32_t* x_sum_or_null,
                                       const uint8_t* w_packed, const float* w_scale, const uint8_t* w_zero, void* out,
                                       int64_t m, int64_t n, int64_t k, int out_dtype, void* workspace,
                                       int64_t workspace_bytes, int arch, const int* plan, void* stream);

// Bytes of workspace a product needs (kind: FG_ABLATION_*; FG_ABLATION_ASYMMETRIC: with x_sum NULL).
FG_API int64_t fg_ablation_workspace_bytes(int kind, int64_t m, int64_t n, int64_t k, int arch);

// {warpgroups, tokens, split, share} that a product with wgmma uses; FG_ERROR_ARCH with mma.sync.
FG_API int fg_ablation_plan(int kind, int64_t m, int64_t n, int64_t k, int arch, int* plan);

// w[N, K] int8 of a packed int4 weight.
FG_API int fg_ablation_unpack(const uint8_t* w_packed, int8_t* w, int64_t n, int64_t k, void* stream);

#ifdef __cplusplus
}
#endif

#endif  // FASTGEMM_ABLATION_H_

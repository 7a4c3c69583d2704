// Prefill: rotary embedding of queries and keys, keys and values into the cache.
#include "../common/dependency.cuh"
#include "../common/launch.h"
#include "../elementwise/row.cuh"
#include "mma.cuh"

namespace fg::attention {
namespace {

constexpr int kRopeThreads = 256;

// One block a token.  A thread handles 8 elements of a head and the 8 that are paired with them, of every
// (kRopeThreads * 16 / D)-th head, so that its angles stay in registers.
template <typename T, int D>
__global__ void __launch_bounds__(kRopeThreads)
    rope_append(const T* qkv, const float* cos_sin, const int32_t* positions, const int32_t* rows, T* k_cache,
                T* v_cache, T* q, int num_heads, int kv_heads, int max_len, int batch) {
  constexpr int kPairs = D / 16, kHeads = kRopeThreads / kPairs;
  grid_launch_dependents();
  grid_dependency_wait();
  const int64_t token = blockIdx.x;
  const int position = positions[token], row = rows[token];
  const bool inside = position >= 0 && position < max_len && row >= 0 && row < batch;
  const int column = threadIdx.x % kPairs * 8, heads = num_heads + 2 * kv_heads;
  float2 cos[4], sin[4];
  const float* angles = cos_sin + static_cast<int64_t>(inside ? position : 0) * D + column;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float4 c = reinterpret_cast<const float4*>(angles)[i], s = reinterpret_cast<const float4*>(angles + D / 2)[i];
    cos[2 * i] = make_float2(c.x, c.y), cos[2 * i + 1] = make_float2(c.z, c.w);
    sin[2 * i] = make_float2(s.x, s.y), sin[2 * i + 1] = make_float2(s.z, s.w);
  }
  const T* source = qkv + token * heads * D + column;
#pragma unroll 2
  for (int head = threadIdx.x / kPairs; head < heads; head += kHeads) {
    uint4 low = *reinterpret_cast<const uint4*>(source + head * D);
    uint4 high = *reinterpret_cast<const uint4*>(source + head * D + D / 2);
    T* target = q + (token * num_heads + head) * D;
    if (head >= num_heads) {
      if (!inside) continue;
      const bool value = head >= num_heads + kv_heads;
      const int cache_head = head - num_heads - (value ? kv_heads : 0);
      target = (value ? v_cache : k_cache) + ((static_cast<int64_t>(row) * kv_heads + cache_head) * max_len + position) * D;
    }
    if (head < num_heads + kv_heads) {
      rotate<T>(low.x, high.x, cos[0], sin[0]);
      rotate<T>(low.y, high.y, cos[1], sin[1]);
      rotate<T>(low.z, high.z, cos[2], sin[2]);
      rotate<T>(low.w, high.w, cos[3], sin[3]);
    }
    if (!inside) {
      const uint32_t nan = Type<T>::pack(NAN, NAN);
      low = high = make_uint4(nan, nan, nan, nan);
    }
    *reinterpret_cast<uint4*>(target + column) = low;
    *reinterpret_cast<uint4*>(target + column + D / 2) = high;
  }
}

struct Arguments {
  const void* qkv;
  const float* cos_sin;
  const int32_t *positions, *rows;
  void *k_cache, *v_cache, *q;
  int64_t tokens, num_heads, kv_heads, max_len, batch;
};

template <typename T, int D>
int launch(const Arguments& a, void* stream) {
  const LaunchShape shape{dim3(static_cast<unsigned>(a.tokens)), kRopeThreads};
  return launch_kernel(rope_append<T, D>, shape, stream, static_cast<const T*>(a.qkv), a.cos_sin, a.positions, a.rows,
                       static_cast<T*>(a.k_cache), static_cast<T*>(a.v_cache), static_cast<T*>(a.q), a.num_heads,
                       a.kv_heads, a.max_len, a.batch);
}

}  // namespace
}  // namespace fg::attention

extern "C" int fg_rope_append(const void* qkv, const float* cos_sin, const int32_t* positions, const int32_t* rows,
                              void* k_cache, void* v_cache, void* q, int dtype, int64_t tokens, int64_t num_heads,
                              int64_t kv_heads, int64_t head_dim, int64_t max_len, int64_t batch, void* stream) {
  using namespace fg::attention;
  using fg::elementwise::aligned16;
  if (tokens < 0 || tokens > INT32_MAX || num_heads <= 0 || num_heads > 65535 || kv_heads <= 0 || kv_heads > 65535 ||
      num_heads % kv_heads != 0 || (head_dim != 64 && head_dim != 128) || max_len <= 0 || max_len > INT32_MAX ||
      batch < 0 || batch > INT32_MAX)
    return FG_ERROR_SIZE;
  if (dtype != FG_F16 && dtype != FG_BF16) return FG_ERROR_DTYPE;
  if (tokens == 0) return FG_OK;
  if (!qkv || !cos_sin || !positions || !rows || !k_cache || !v_cache || !q) return FG_ERROR_NULL_POINTER;
  if (!aligned16(qkv) || !aligned16(cos_sin) || !aligned16(k_cache) || !aligned16(v_cache) || !aligned16(q))
    return FG_ERROR_ALIGNMENT;
  const Arguments a{qkv, cos_sin, positions, rows, k_cache, v_cache, q, tokens, num_heads, kv_heads, max_len, batch};
  if (dtype == FG_F16) return head_dim == 64 ? launch<__half, 64>(a, stream) : launch<__half, 128>(a, stream);
  return head_dim == 64 ? launch<__nv_bfloat16, 64>(a, stream) : launch<__nv_bfloat16, 128>(a, stream);
}

// Attention of one token of each sequence to a share of its positions, with rotary embedding and cache append.
//
// A block handles one split of the positions for one head of the cache and up to 8 of its query heads.  Its compute
// warps are independent until the end: each takes every kWarps-th unit of 16 positions through a ring of shared-memory
// stages of its own, keeps a running maximum, and multiplies with the positions as the rows of the tensor-core tile,
//
//     S^T [16 positions, 8 heads] = K Q^T        O^T [D, 8 heads] += V^T P^T
//
// so that a single query head wastes columns, not passes.  movmatrix turns the scores' fragment into that of P^T.
#pragma once

#include "prepare.cuh"

namespace fg::attention {

template <int kWarps_, int kStageBytes_, int kMinBlocks_>
struct Config {
  static constexpr int kWarps = kWarps_;            // compute warps
  static constexpr int kRingBytes = kStageBytes_;   // stages of one warp
  static constexpr int kMinBlocks = kMinBlocks_;    // of a multiprocessor
  static constexpr int kComputeThreads = 32 * kWarps;
  static constexpr int kThreads = kComputeThreads + 32;
  static constexpr int kSharedBytes = kWarps * kRingBytes;
};

// One block on every multiprocessor: many warps, so that each computes a unit or two after the last bytes arrive.
using OneWave = Config<12, 16384, 1>;
// Many blocks: one starts and ends while the other of the multiprocessor streams.
using ManyBlocks = Config<4, 24576, 2>;

constexpr int kDoneBarrier = 1, kPreparedBarrier = 2, kIssuedBarrier = 3;

// Online softmax of the columns (heads) 2 t and 2 t + 1 of a lane.
template <int D>
struct Softmax {
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};  // over the lane's own rows
  float output[D / 16][4] = {};
};

__device__ __forceinline__ float column_max(float v) {
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, offset));
  return v;
}

__device__ __forceinline__ float column_sum(float v) {
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

template <typename T, int D>
__device__ __forceinline__ void attend_unit(const Params& p, const Work& w, int unit, uint32_t stage,
                                            const uint32_t (&q)[D / 16][2], Softmax<D>& s) {
  const int lane = threadIdx.x % 32;
  float scores[2][4] = {};
#pragma unroll
  for (int kk = 0; kk < D / 16; ++kk) {
    uint32_t k[4];
    load_matrices(k, stage + chunk_offset<D>(lane % 16, 2 * kk + lane / 16));
    Type<T>::multiply_add(scores[kk % 2], k, q[kk][0], q[kk][1]);
  }
  float weight[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int position = unit * kUnit + lane / 4 + e / 2 * 8;
    const bool valid = position >= w.first && position <= w.length;
    weight[e] = valid ? (scores[0][e] + scores[1][e]) * p.scale : -INFINITY;
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const float maximum = fmaxf(s.maximum[j], column_max(fmaxf(weight[j], weight[j + 2])));
    const float correction = exp2_approximate(s.maximum[j] - maximum);
    s.maximum[j] = maximum;
    weight[j] = exp2_approximate(weight[j] - maximum);
    weight[j + 2] = exp2_approximate(weight[j + 2] - maximum);
    s.sum[j] = fmaf(s.sum[j], correction, weight[j] + weight[j + 2]);
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      s.output[i][j] *= correction;
      s.output[i][j + 2] *= correction;
    }
  }
  const uint32_t p0 = ptx::transpose_matrix(Type<T>::pack(weight[0], weight[1]));
  const uint32_t p1 = ptx::transpose_matrix(Type<T>::pack(weight[2], weight[3]));
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    uint32_t v[4];
    load_matrices_transposed(
        v, stage + Tile<D>::kBytes + chunk_offset<D>(lane % 8 + (lane & 16) / 2, 2 * i + lane / 8 % 2));
    Type<T>::multiply_add(s.output[i], v, p0, p1);
  }
}

// Adds up the warps and stores the split's result.
template <class C, int D>
__device__ __forceinline__ void store_partials(const Params& p, const Work& w, Softmax<D>& s, float* shared) {
  __shared__ float2 stats[C::kWarps][kHeadsPerBlock];
  constexpr int kStride = D + 4;  // four heads fall into different banks
  static_assert(C::kWarps * kHeadsPerBlock * kStride * 4 <= C::kSharedBytes, "");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  ptx::named_barrier_sync(kDoneBarrier, C::kComputeThreads);  // the stages have been read
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int head = lane % 4 * 2 + j;
    const float sum = column_sum(s.sum[j]);
    if (head < w.heads) {
      if (lane < 4) stats[warp][head] = make_float2(s.maximum[j], sum);
      float* output = shared + (warp * kHeadsPerBlock + head) * kStride + lane / 4;
#pragma unroll
      for (int i = 0; i < D / 16; ++i) {
        output[16 * i] = s.output[i][j];
        output[16 * i + 8] = s.output[i][j + 2];
      }
    }
  }
  ptx::named_barrier_sync(kDoneBarrier, C::kComputeThreads);
  const int64_t first = (static_cast<int64_t>(w.row) * p.splits + blockIdx.x) * p.num_heads + w.first_head;
  for (int item = threadIdx.x; item < w.heads * D; item += C::kComputeThreads) {
    const int head = item / D, column = item % D;
    float maximum = -INFINITY, sum = 0.0f, total = 0.0f;
#pragma unroll
    for (int i = 0; i < C::kWarps; ++i) maximum = fmaxf(maximum, stats[i][head].x);
#pragma unroll
    for (int i = 0; i < C::kWarps; ++i) {
      const float2 stat = stats[i][head];
      const float factor = stat.x == -INFINITY ? 0.0f : exp2_approximate(stat.x - maximum);
      sum = fmaf(factor, stat.y, sum);
      total = fmaf(factor, shared[(i * kHeadsPerBlock + head) * kStride + column], total);
    }
    p.partial[(first + head) * D + column] = total;
    if (column == 0) p.stats[first + head] = make_float2(maximum, sum);
  }
}

template <typename T, int D, class C>
__global__ void __launch_bounds__(C::kThreads, C::kMinBlocks) decode_partials(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) uint8_t stages[];
  __shared__ Prepared<T, D> prepared;
  grid_launch_dependents();
  const int warp = threadIdx.x / 32;
  Work w = work_of_block<D>(p);
  if (warp == C::kWarps) {
    prepare<T, D>(p, w, prepared, kIssuedBarrier, kPreparedBarrier, C::kThreads);
    return;
  }
  constexpr int kStages = C::kRingBytes / Tile<D>::kStageBytes;
  const uint32_t ring = shared_address(stages) + warp * C::kRingBytes;
  const char* k = static_cast<const char*>(p.k_cache) + w.cache_offset * 2;
  const char* v = static_cast<const char*>(p.v_cache) + w.cache_offset * 2;

  // The length may still change until the preceding kernel is complete.  The first copies do not wait for it to be read
  // again, and with cache_ready not for that kernel; they are repeated in the rare case that it has changed.
  set_length(p, w, clamp_length(p, load_length(p, w.row)));
  int length = 0;
  bool inside = false, waited = false;
  for (;;) {
    if (waited || p.cache_ready) {
#pragma unroll
      for (int i = 0; i < kStages; ++i) {
        const int unit = w.begin + warp + i * C::kWarps;
        if (unit < w.end) load_unit<D>(w, k, v, unit, ring + i * Tile<D>::kStageBytes);
        commit_copies();
      }
    }
    if (!waited) {
      waited = true;
      grid_dependency_wait();
      length = load_length(p, w.row);
      inside = length == clamp_length(p, length);
      ptx::named_barrier_sync(kIssuedBarrier, C::kThreads);
      if (!p.cache_ready) continue;
    }
    if (length == w.length || !inside) break;
    wait_copies<0>();
    set_length(p, w, length);
  }
  if (!inside || w.begin == w.end) {
    wait_copies<0>();
    // A sum of NaN makes the token's output NaN.
    if (threadIdx.x < w.heads)
      p.stats[(static_cast<int64_t>(w.row) * p.splits + blockIdx.x) * p.num_heads + w.first_head + threadIdx.x] =
          make_float2(inside ? -INFINITY : 0.0f, inside ? 0.0f : NAN);
    return;
  }
  uint32_t q[D / 16][2];
  ptx::named_barrier_sync(kPreparedBarrier, C::kThreads);
  load_queries<T, D>(prepared, q);

  Softmax<D> softmax;
  uint32_t stage = ring;
  for (int unit = w.begin + warp; unit < w.end; unit += C::kWarps) {
    wait_copies<kStages - 1>();
    __syncwarp();
    if (unit == w.length / kUnit) insert_position<T, D>(prepared, stage, w.length % kUnit);
    attend_unit<T, D>(p, w, unit, stage, q, softmax);
    __syncwarp();
    const int next = unit + kStages * C::kWarps;
    if (next < w.end) load_unit<D>(w, k, v, next, stage);
    commit_copies();
    stage += Tile<D>::kStageBytes;
    if (stage == ring + C::kRingBytes) stage = ring;
  }
  store_partials<C, D>(p, w, softmax, reinterpret_cast<float*>(stages));
}

}  // namespace fg::attention

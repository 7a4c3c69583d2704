// C entry points of decode attention: checks, the number of splits, the two launches.
#include <math.h>

#include "../common/launch.h"
#include "combine.cuh"
#include "partials.cuh"

namespace fg::attention {
namespace {

constexpr int64_t kMaxGrid = 65535;

struct Sizes {
  int64_t batch, num_heads, kv_heads, head_dim, max_len, window;  // window 0: all positions
  int64_t group() const { return num_heads / kv_heads; }
  int64_t head_blocks() const { return (group() + kHeadsPerBlock - 1) / kHeadsPerBlock; }
};

bool valid(const Sizes& s) {
  return s.batch >= 0 && s.batch <= kMaxGrid && s.kv_heads > 0 && s.num_heads > 0 && s.num_heads <= kMaxGrid &&
         s.num_heads % s.kv_heads == 0 && (s.head_dim == 64 || s.head_dim == 128) && s.max_len > 0 &&
         s.max_len <= kMaxPositions && s.window >= 0;
}

// The number of splits with the least work for the busiest multiprocessor: its blocks' units, each block with an
// overhead of two units (start, combination).  The grid cannot depend on the lengths, which the host does not know.
int choose_splits(const Sizes& s, int multiprocessors) {
  const int64_t positions = s.window > 0 && s.window < s.max_len ? s.window : s.max_len;
  const int64_t units = (positions + kUnit - 1) / kUnit, blocks = s.batch * s.kv_heads * s.head_blocks();
  int best = 1;
  int64_t least = INT64_MAX;
  for (int splits = 1; splits <= kMaxSplits && splits <= units; ++splits) {
    const int64_t waves = (blocks * splits + multiprocessors - 1) / multiprocessors;
    const int64_t cost = waves * ((units + splits - 1) / splits + 2);
    if (cost < least) {
      least = cost;
      best = splits;
    }
  }
  return best;
}

// splits, or the chosen number where that is 0; negative: an error code with its sign changed.
int resolve_splits(const Sizes& s, int splits) {
  if (splits < 0 || splits > kMaxSplits) return -FG_ERROR_SIZE;
  if (splits > 0) return splits;
  const int multiprocessors = device_multiprocessors();
  return multiprocessors < 0 ? multiprocessors - FG_ERROR_CUDA : choose_splits(s, multiprocessors);
}

int64_t stats_offset(const Sizes& s, int splits) { return s.batch * splits * s.num_heads * s.head_dim * 4; }

int64_t workspace_bytes(const Sizes& s, int splits) {
  return stats_offset(s, splits) + s.batch * splits * s.num_heads * static_cast<int64_t>(sizeof(float2));
}

template <typename T, int D, class C>
int launch_partials(const Params& p, int64_t batch, void* stream) {
  const LaunchShape shape{dim3(p.splits, p.kv_heads * p.head_blocks, static_cast<unsigned>(batch)), C::kThreads,
                          C::kSharedBytes};
  return launch_kernel(decode_partials<T, D, C>, shape, stream, p);
}

template <typename T, int kKept, int kBatch, typename Out>
int launch_combine(const Params& p, const Sizes& s, Out* out, float* scale, int64_t blocks, int64_t threads,
                   size_t shared_bytes, void* stream) {
  const bool cluster = std::is_same<Out, int8_t>::value;
  const LaunchShape shape{dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(s.batch)),
                          static_cast<unsigned>(threads), shared_bytes, cluster ? static_cast<unsigned>(blocks) : 1};
  return launch_kernel(combine<T, kKept, kBatch, Out>, shape, stream, p.partial, p.stats, p.splits, p.num_heads,
                       s.head_dim, out, scale);
}

template <typename T, int kBatch>
int run_combine(const Params& p, const Sizes& s, void* out, float* scale, void* stream) {
  constexpr int kShare = 128;  // vectors, and threads, of a block
  const int64_t vectors = s.num_heads * s.head_dim / kCombineVector;
  if (!scale)
    return launch_combine<T, 1, kBatch>(p, s, static_cast<T*>(out), nullptr, (vectors + kShare - 1) / kShare, kShare, 0,
                                        stream);
  auto* q = static_cast<int8_t*>(out);
  int64_t blocks = 2;  // cluster_max needs a launch in clusters
  while (blocks < elementwise::kClusterBlocks && vectors > kShare * blocks) blocks *= 2;
  const int64_t share = (vectors + blocks - 1) / blocks;
  if (share <= kCombineThreads && has_dependent_launch())
    return launch_combine<T, 1, kBatch>(p, s, q, scale, blocks, (share + 31) / 32 * 32, 0, stream);
  constexpr int64_t kVectorBytes = kCombineVector * sizeof(T);
  if (vectors * kVectorBytes <= 65536)
    return launch_combine<T, elementwise::kInShared, kBatch>(p, s, q, scale, 1, kCombineThreads, vectors * kVectorBytes,
                                                             stream);
  return launch_combine<T, elementwise::kReread, kBatch>(p, s, q, scale, 1, kCombineThreads, 0, stream);
}

template <typename T, class C>
int run(const Params& p, const Sizes& s, void* out, float* scale, void* stream) {
  const int code =
      s.head_dim == 64 ? launch_partials<T, 64, C>(p, s.batch, stream) : launch_partials<T, 128, C>(p, s.batch, stream);
  if (code != FG_OK) return code;
  return p.splits <= 4 ? run_combine<T, 4>(p, s, out, scale, stream) : run_combine<T, 16>(p, s, out, scale, stream);
}

template <typename T>
int run(const Params& p, const Sizes& s, void* out, float* scale, int64_t blocks, void* stream) {
  const bool one_wave = blocks <= device_multiprocessors() && device_shared_bytes() >= OneWave::kSharedBytes + 4096;
  return one_wave ? run<T, OneWave>(p, s, out, scale, stream) : run<T, ManyBlocks>(p, s, out, scale, stream);
}

}  // namespace
}  // namespace fg::attention

extern "C" int64_t fg_decode_attention_workspace_bytes(int64_t batch, int64_t num_heads, int64_t kv_heads,
                                                       int64_t head_dim, int64_t max_len, int64_t window, int splits) {
  using namespace fg::attention;
  const Sizes sizes{batch, num_heads, kv_heads, head_dim, max_len, window};
  if (!valid(sizes) || batch == 0) return 0;
  const int resolved = resolve_splits(sizes, splits);
  return resolved < 0 ? 0 : workspace_bytes(sizes, resolved);
}

extern "C" int fg_decode_attention(const void* qkv, const float* cos_sin, const int32_t* lengths, void* k_cache,
                                   void* v_cache, float softmax_scale, int dtype, void* out, float* scale_or_null,
                                   int64_t batch, int64_t num_heads, int64_t kv_heads, int64_t head_dim, int64_t max_len,
                                   int64_t window, int splits, int cache_ready, void* workspace,
                                   int64_t workspace_size, void* stream) {
  using namespace fg::attention;
  using fg::elementwise::aligned16;
  const Sizes sizes{batch, num_heads, kv_heads, head_dim, max_len, window};
  if (!valid(sizes) || splits < 0 || splits > kMaxSplits) return FG_ERROR_SIZE;
  if (dtype != FG_F16 && dtype != FG_BF16) return FG_ERROR_DTYPE;
  if (batch == 0) return FG_OK;
  if (!qkv || !cos_sin || !lengths || !k_cache || !v_cache || !out || !workspace) return FG_ERROR_NULL_POINTER;
  if (!aligned16(qkv) || !aligned16(cos_sin) || !aligned16(k_cache) || !aligned16(v_cache) || !aligned16(out) ||
      !aligned16(workspace))
    return FG_ERROR_ALIGNMENT;
  const int resolved = resolve_splits(sizes, splits);
  if (resolved < 0) return -resolved;
  if (workspace_size < workspace_bytes(sizes, resolved)) return FG_ERROR_WORKSPACE;

  Params p{};
  p.qkv = qkv;
  p.cos_sin = cos_sin;
  p.lengths = lengths;
  p.k_cache = k_cache;
  p.v_cache = v_cache;
  p.partial = static_cast<float*>(workspace);
  p.stats = reinterpret_cast<float2*>(static_cast<char*>(workspace) + stats_offset(sizes, resolved));
  p.scale = softmax_scale * static_cast<float>(M_LOG2E);
  p.num_heads = static_cast<int>(num_heads);
  p.kv_heads = static_cast<int>(kv_heads);
  p.group = static_cast<int>(sizes.group());
  p.head_blocks = static_cast<int>(sizes.head_blocks());
  p.max_len = static_cast<int>(max_len);
  p.window = window > 0 && window < max_len ? static_cast<int>(window) : static_cast<int>(max_len);
  p.splits = resolved;
  p.cache_ready = cache_ready != 0;
  const int64_t blocks = batch * kv_heads * p.head_blocks * resolved;
  return dtype == FG_F16 ? run<__half>(p, sizes, out, scale_or_null, blocks, stream)
                         : run<__nv_bfloat16>(p, sizes, out, scale_or_null, blocks, stream);
}

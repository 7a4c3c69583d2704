// Packed int4 to int8, as a kernel of its own: what a product without in-register unpacking has to run first.
#include "ablation.h"
#include "checks.h"

namespace fg {
namespace ablation {
namespace {

constexpr int kThreads = 256;

// Int8 values of the nibbles in the low halves of the bytes.
__device__ __forceinline__ uint32_t extend(uint32_t nibbles) {
  const uint32_t sign = nibbles & 0x08080808u;
  return nibbles | sign << 1 | sign << 2 | sign << 3 | sign << 4;
}

// Word `index` of four, without indexing an array at run time.
__device__ __forceinline__ uint32_t select(const uint32_t (&word)[4], int index) {
  const uint32_t low = index & 1 ? word[1] : word[0], high = index & 1 ? word[3] : word[2];
  return index & 2 ? high : low;
}

// One thread reads 16 packed bytes: four columns in each of four runs of 16 columns, of two rows.  The four threads
// that share the rows exchange words until each holds one whole run, so that a row of a tile is written as 64 bytes.
__global__ void __launch_bounds__(kThreads) unpack(const uint8_t* packed, int8_t* w, int64_t n, int64_t k,
                                                   int64_t column_tiles, int64_t pieces) {
  const int64_t piece = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t tile = piece / 128;
  const int in_tile = static_cast<int>(piece % 128), warp = in_tile / 32, lane = in_tile % 32, run = lane % 4;
  const int64_t row = tile / column_tiles * 64 + 16 * warp + lane / 4;
  const int64_t column = tile % column_tiles * 64 + 16 * run;
  uint4 words = make_uint4(0, 0, 0, 0);
  if (piece < pieces) words = reinterpret_cast<const uint4*>(packed)[piece];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int shift = half == 0 ? 4 : 0;
    uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) word[i] = extend((word[i] >> shift) & 0x0F0F0F0Fu);
    uint32_t mine[4] = {};  // the run's words, in the order of the threads they came from: partner run ^ i
#pragma unroll
    for (int i = 0; i < 4; ++i) mine[i] = __shfl_xor_sync(0xffffffffu, select(word, run ^ i), i);
    if (piece >= pieces || row + 8 * half >= n || column >= k) continue;
    const uint4 out =
        make_uint4(select(mine, run), select(mine, run ^ 1), select(mine, run ^ 2), select(mine, run ^ 3));
    *reinterpret_cast<uint4*>(w + (row + 8 * half) * k + column) = out;
  }
}

}  // namespace
}  // namespace ablation
}  // namespace fg

extern "C" int fg_ablation_unpack(const uint8_t* w_packed, int8_t* w, int64_t n, int64_t k, void* stream) {
  using namespace fg::ablation;
  if (n <= 0 || n % 16 != 0 || k <= 0 || k % 32 != 0) return FG_ERROR_SIZE;
  if (!w_packed || !w) return FG_ERROR_NULL_POINTER;
  if (!aligned16(w_packed) || !aligned16(w)) return FG_ERROR_ALIGNMENT;
  const int64_t column_tiles = (k + 63) / 64, pieces = (n + 63) / 64 * column_tiles * 128;
  const int64_t blocks = (pieces + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX) return FG_ERROR_SIZE;
  unpack<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(w_packed, w, n, k,
                                                                                            column_tiles, pieces);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? FG_OK : FG_ERROR_CUDA + static_cast<int>(status);
}

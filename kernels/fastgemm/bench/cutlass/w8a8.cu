// One configuration of CUTLASS's int8 GEMM for Hopper, as a C function: out[M, N] (fp16) =
// diag(x_scale) (x[M, K] w[N, K]^T) diag(w_scale), both scales applied to the int32 sums by an epilogue visitor tree.
//
// Compiled once per configuration, which the macros name (see build.py):
//   CW_NAME                     suffix of the exported functions
//   CW_M, CW_N, CW_K            tile
//   CW_CLUSTER_M, CW_CLUSTER_N  cluster
//   CW_SCHEDULE                 0 one warpgroup, 1 ping-pong, 2 cooperative
//   CW_STREAM_K                 1 for the stream-K tile scheduler (cooperative alone)
//   CW_SWAP                     1 computes out^T = w x^T: weights fill the rows of a tile, tokens its columns

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>
#include <type_traits>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/version.h"

namespace {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;

constexpr bool kSwap = CW_SWAP;
constexpr bool kStreamK = CW_STREAM_K;
static_assert(!kStreamK || CW_SCHEDULE == 2, "the stream-K scheduler needs the cooperative kernel");

using Tile = Shape<Int<CW_M>, Int<CW_N>, Int<CW_K>>;
using Cluster = Shape<Int<CW_CLUSTER_M>, Int<CW_CLUSTER_N>, _1>;
using KernelSchedule = std::conditional_t<
    CW_SCHEDULE == 0, cutlass::gemm::KernelTmaWarpSpecialized,
    std::conditional_t<CW_SCHEDULE == 1, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                       cutlass::gemm::KernelTmaWarpSpecializedCooperative>>;
using EpilogueSchedule = std::conditional_t<CW_SCHEDULE == 2, cutlass::epilogue::TmaWarpSpecializedCooperative,
                                            cutlass::epilogue::TmaWarpSpecialized>;
using Scheduler = std::conditional_t<kStreamK, cutlass::gemm::StreamKScheduler, cutlass::gemm::PersistentScheduler>;
using OutLayout = std::conditional_t<kSwap, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;

constexpr int kAlignmentIn = 16;  // elements: TMA needs 16 bytes
constexpr int kAlignmentOut = 8;

// Scale by row of a tile (a column vector) and by column; loaded element by element, so M needs no alignment.
using RowScale = fusion::Sm90ColBroadcast<0, Tile, float, float, Stride<_1, _0, _0>, 1, false>;
using ColumnScale = fusion::Sm90RowBroadcast<0, Tile, float, float, Stride<_0, _1, _0>, 4, false>;
using TokenScale = std::conditional_t<kSwap, ColumnScale, RowScale>;
using ChannelScale = std::conditional_t<kSwap, RowScale, ColumnScale>;
template <class Out>
using Multiply = fusion::Sm90Compute<cutlass::multiplies, Out, float, cutlass::FloatRoundStyle::round_to_nearest>;
// (float(sum) * x_scale) * w_scale, then rounded to fp16.
using ScaledByToken = fusion::Sm90EVT<Multiply<float>, TokenScale, fusion::Sm90AccFetch>;
using Scaled = fusion::Sm90EVT<Multiply<cutlass::half_t>, ChannelScale, ScaledByToken>;

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
    cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, void, OutLayout, kAlignmentOut, cutlass::half_t,
    OutLayout, kAlignmentOut, EpilogueSchedule, Scaled>::CollectiveOp;
using Stages = cutlass::gemm::collective::StageCountAutoCarveout<
    static_cast<int>(sizeof(typename Epilogue::SharedStorage))>;
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, cutlass::layout::RowMajor, kAlignmentIn, int8_t,
    cutlass::layout::ColumnMajor, kAlignmentIn, int32_t, Tile, Cluster, Stages, KernelSchedule>::CollectiveOp;
using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue, Scheduler>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

// `raster`: 0 CUTLASS's choice, 1 tiles along M first, 2 along N first (of out, whether swapped or not).
typename Gemm::Arguments make_arguments(const int8_t* x, const float* x_scale, const int8_t* w, const float* w_scale,
                                        void* out, int64_t m, int64_t n, int64_t k, int raster, int swizzle,
                                        int sm_count) {
  typename Gemm::Arguments arguments;
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  const int rows = static_cast<int>(kSwap ? n : m), columns = static_cast<int>(kSwap ? m : n);
  arguments.problem_shape = {rows, columns, static_cast<int>(k), 1};

  arguments.mainloop.ptr_A = kSwap ? w : x;
  arguments.mainloop.dA = {k, _1{}, int64_t{0}};
  arguments.mainloop.ptr_B = kSwap ? x : w;
  arguments.mainloop.dB = {k, _1{}, int64_t{0}};

  typename TokenScale::Arguments token{x_scale};
  typename ChannelScale::Arguments channel{w_scale};
  arguments.epilogue.thread = {channel, {token, {}, {}}, {}};
  arguments.epilogue.ptr_C = nullptr;
  arguments.epilogue.ptr_D = static_cast<cutlass::half_t*>(out);
  get<kSwap ? 1 : 0>(arguments.epilogue.dD) = n;
  arguments.epilogue.dC = arguments.epilogue.dD;

  arguments.hw_info.sm_count = sm_count;
  using Raster = std::decay_t<decltype(arguments.scheduler.raster_order)>;
  const bool along_m = (raster == 1) != kSwap;
  arguments.scheduler.raster_order = raster == 0 ? Raster::Heuristic : along_m ? Raster::AlongM : Raster::AlongN;
  arguments.scheduler.max_swizzle_size = swizzle;
  return arguments;
}

bool fits(int64_t m, int64_t n, int64_t k) {
  return m > 0 && n > 0 && k > 0 && m <= INT_MAX && n <= INT_MAX && k <= INT_MAX;
}

constexpr int kInvalid = static_cast<int>(cutlass::Status::kErrorInvalidProblem);
constexpr int kNoWorkspace = static_cast<int>(cutlass::Status::kErrorWorkspaceNull);

}  // namespace

#define CW_JOIN_(a, b) a##b
#define CW_JOIN(a, b) CW_JOIN_(a, b)
#define CW_EXPORT extern "C" __attribute__((visibility("default")))

// Version of CUTLASS, as major * 100 + minor * 10 + patch.
CW_EXPORT int CW_JOIN(cw_version_, CW_NAME)() { return CUTLASS_VERSION; }

// Stages of the pipeline and bytes of shared memory of a CTA.
CW_EXPORT int CW_JOIN(cw_stages_, CW_NAME)() { return Mainloop::DispatchPolicy::Stages; }
CW_EXPORT int CW_JOIN(cw_shared_bytes_, CW_NAME)() { return Kernel::SharedStorageSize; }

// Bytes of workspace; -1 for a size that is not supported.
CW_EXPORT int64_t CW_JOIN(cw_workspace_bytes_, CW_NAME)(int64_t m, int64_t n, int64_t k, int raster, int swizzle,
                                                        int sm_count) {
  if (!fits(m, n, k)) return -1;
  return static_cast<int64_t>(Gemm::get_workspace_size(
      make_arguments(nullptr, nullptr, nullptr, nullptr, nullptr, m, n, k, raster, swizzle, sm_count)));
}

// Launches on `stream`; `dependent` launches it while the preceding kernel still runs (it waits before it reads).
// Returns a cutlass::Status, 0 for success.
CW_EXPORT int CW_JOIN(cw_gemm_, CW_NAME)(const int8_t* x, const float* x_scale, const int8_t* w, const float* w_scale,
                                         void* out, int64_t m, int64_t n, int64_t k, int raster, int swizzle,
                                         int sm_count, int dependent, void* workspace, int64_t workspace_bytes,
                                         cudaStream_t stream) {
  if (!fits(m, n, k)) return kInvalid;
  const auto arguments = make_arguments(x, x_scale, w, w_scale, out, m, n, k, raster, swizzle, sm_count);
  cutlass::Status status = Gemm::can_implement(arguments);
  if (status != cutlass::Status::kSuccess) return static_cast<int>(status);
  if (static_cast<int64_t>(Gemm::get_workspace_size(arguments)) > workspace_bytes) return kNoWorkspace;
  Gemm gemm;
  status = gemm.initialize(arguments, workspace, stream);
  // Stream-K clears its workspace in front of the kernel, which cannot start before that.
  if (status == cutlass::Status::kSuccess) status = gemm.run(stream, nullptr, dependent != 0 && !kStreamK);
  return static_cast<int>(status);
}

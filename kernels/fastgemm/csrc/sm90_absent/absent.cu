// Stands in for the Hopper kernels in a library built without sm_90a.
#include "../common/gemm_args.h"

namespace fg {
namespace sm90 {

int w4a8(const GemmArgs&) { return FG_ERROR_ARCH; }
int w8a8(const GemmArgs&) { return FG_ERROR_ARCH; }
int64_t workspace_bytes(int, int64_t, int64_t, int64_t) { return 0; }

}  // namespace sm90
}  // namespace fg

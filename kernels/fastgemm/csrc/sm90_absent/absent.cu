// Stands in for the Hopper kernels in a library built without sm_90a.
#include "../sm90/variants.h"

namespace fg {
namespace sm90 {

int w4a8(const GemmArgs&) { return FG_ERROR_ARCH; }
int w8a8(const GemmArgs&) { return FG_ERROR_ARCH; }
int w4a8_grouped(const GemmArgs&, const Plan*) { return FG_ERROR_ARCH; }
int w4a8_zero_point(const GemmArgs&, const uint8_t*, const int32_t*, const Plan*) { return FG_ERROR_ARCH; }
int64_t workspace_bytes(int, int64_t, int64_t, int64_t) { return 0; }

// No warpgroups: there is no kernel to plan for.  Any plan of a caller will do, so that the product says so itself.
Plan choose_plan(int, int64_t, int64_t, int64_t, bool, int) { return {}; }
bool is_plan(const Plan&, int64_t) { return true; }

}  // namespace sm90
}  // namespace fg

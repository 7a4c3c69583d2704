// TMA tensor maps of row-major matrices, encoded through the driver entry point (no link against libcuda).
#pragma once

#include <cuda.h>
#include <stdint.h>

namespace fg::sm90 {

// Map of a row-major matrix [rows, columns]; the box is box_rows x box_columns elements, with the 128-byte swizzle
// box_columns must be 128 bytes.  Elements outside the matrix read as zero and are not written.
// Returns an FG_* code.
int encode_tensor_map(CUtensorMap* map, const void* base, CUtensorMapDataType type, int element_bytes, int64_t rows,
                      int64_t columns, int box_rows, int box_columns,
                      CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B);

}  // namespace fg::sm90

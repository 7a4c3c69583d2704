#pragma once

#include <cuda_runtime.h>

#include "epilogue.cuh"

namespace fg {
namespace sm80 {

// Finishes the output from partial [splits, M, N]: the sum over the splits in their order, then the epilogue.
cudaError_t add_splits(const int32_t* partial, int splits, int64_t m, const Epilogue& epilogue, cudaStream_t stream);

}  // namespace sm80
}  // namespace fg

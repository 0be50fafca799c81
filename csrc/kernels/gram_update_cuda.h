// Completes a symmetric matrix of which one triangle was computed: matrix[i, j] = matrix[j, i] for i < j. On a stream;
// the pointer is the device's.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/element_type.h"

namespace d2moe::kernels {

// `matrix` [n, n] is contiguous, kFloat32 or kFloat64.
cudaError_t launch_mirror_lower_triangle(void* matrix, ElementType type, int64_t n, cudaStream_t stream);

}  // namespace d2moe::kernels

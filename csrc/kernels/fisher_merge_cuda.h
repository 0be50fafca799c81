// The launch of fisher_merge.h's sums on a stream; all pointers are the device's.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/element_type.h"

namespace d2moe::kernels {

// All `count` elements. `accumulators` is the type of both sums and of the arithmetic: kFloat32 or kFloat64.
cudaError_t launch_fisher_merge(void* weighted_sum, void* fisher_sum, ElementType accumulators, const void* weight,
                                ElementType weight_type, const void* gradient, ElementType gradient_type, double scale,
                                int64_t count, cudaStream_t stream);

}  // namespace d2moe::kernels

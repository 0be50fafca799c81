// Completes a symmetric matrix of which one triangle was computed: matrix[i, j] = matrix[j, i] for i < j.
#pragma once

#include <cstdint>

#include "kernels/element_type.h"

namespace d2moe::kernels {

// The number of square tiles along one side of an [n, n] matrix: the units a caller can split over its threads.
int64_t mirror_tiles(int64_t n);

// Copies the lower triangle of `matrix` [n, n] (kFloat32 or kFloat64, strides in elements) into the upper one, for the
// tile rows [tile_begin, tile_end) of the lower triangle.
void mirror_lower_triangle(void* matrix, ElementType type, int64_t n, int64_t row_stride, int64_t column_stride,
                           int64_t tile_begin, int64_t tile_end);

}  // namespace d2moe::kernels

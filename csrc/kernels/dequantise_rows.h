// out[i, j] = scales[i] * source[i, j]: a factor stored in eight bits, as the products read it.
#pragma once

#include <cstdint>

#include "kernels/element_type.h"

namespace d2moe::kernels {

// For row_begin <= i < row_end. source [rows, columns] and out [rows, columns] are contiguous, scales is [rows]; scales
// and out are of `type`, float32, bfloat16 or float16. Each product is taken in float32 and rounded once.
void dequantise_rows(const int8_t* source, const void* scales, ElementType type, int64_t row_begin, int64_t row_end,
                     int64_t columns, void* out);

}  // namespace d2moe::kernels

// out[i, j] = source[rows[i], columns[j]], or 0 where selected[j] is 0: the part of X that one base or expert
// multiplies.
#pragma once

#include <cstdint>

#include "kernels/element_type.h"

namespace d2moe::kernels {

// For row_begin <= i < row_end. Element (r, c) of the source stands at source[r * row_stride + c]; out is [rows,
// num_columns]. columns == nullptr means columns[j] == j. selected [num_columns] == nullptr means all: the unselected
// columns become 0, which leaves them out of a product with the whole base without a copy of the base.
void gather_rows(const void* source, ElementType type, int64_t row_stride, const int64_t* rows, int64_t row_begin,
                 int64_t row_end, const int32_t* columns, int64_t num_columns, const uint8_t* selected, void* out);

}  // namespace d2moe::kernels

// Rows between the dtype of the forward, the type that products take them in (product_kernels.h: the same, or float32)
// and the float32 of sums. Each element is rounded once, to nearest even.
#pragma once

#include <cstdint>

#include "kernels/element_type.h"

namespace d2moe::kernels {

// out[j] = source[columns[j]], columns == nullptr: source[j]; `to` is `from` or float32.
void take_row(const void* source, ElementType from, const int32_t* columns, int64_t count, ElementType to, void* out);

// out[j] = sums[j]
void store_row(const float* sums, int64_t count, ElementType to, void* out);

// sums[j] += scale * row[columns[j]], columns == nullptr: row[j]
void add_row(const void* row, ElementType type, float scale, const int32_t* columns, int64_t count, float* sums);

// out = source [count] without the elements at `skipped`, which ascend.
void take_row_besides(const void* source, ElementType type, const int32_t* skipped, int64_t num_skipped, int64_t count,
                      void* out);

// row[j] = 0 where keeps[j] is 0
void clear_row(const uint8_t* keeps, int64_t count, ElementType type, void* row);

// out[j] = source[j], exactly: every integer of eight bits is a number of each forward type.
void widen_row(const int8_t* source, int64_t count, ElementType to, void* out);

}  // namespace d2moe::kernels

// Which input channels of a base are worth multiplying (eq. 9 of the paper):
//
//   C_j = column_norms[j] * ||X[:, columns[j]]||_2,   selected = the `keep` positions with the largest C_j, ascending.
//
// In three steps, so that a caller can hold its own rows of X and split the columns over its own threads:
//   accumulate_column_squares  X [rows, in] -> squares [in], float64: neither float32 nor a 16-bit type can overflow it
//   score_columns              squares, column_norms, columns -> scores [num_columns], float32
//   select_columns             scores -> selected [keep], int32: distinct, in range and ascending for any scores at all
#pragma once

#include <cstdint>

#include "kernels/element_type.h"

namespace d2moe::kernels {

// squares[j] += sum over rows of X[row, j]^2, for column_begin <= j < column_end. The caller zeroes `squares`.
// rows [num_rows] point to the elements of X's rows.
void accumulate_column_squares(const void* const* rows, ElementType type, int64_t num_rows, int64_t column_begin,
                               int64_t column_end, double* squares);

// scores[j] = column_norms[j] * sqrt(squares[columns[j]]); columns == nullptr means columns[j] == j.
// Every columns[j] must be a valid index into `squares`.
void score_columns(const double* squares, const float* column_norms, const int32_t* columns, int64_t num_columns,
                   float* scores);

// Writes the positions of the `keep` largest scores in ascending order, 0 <= keep <= num_columns < 2^31. NaN counts
// as +infinity; of equal scores the lower position wins.
void select_columns(const float* scores, int64_t num_columns, int64_t keep, int32_t* selected);

}  // namespace d2moe::kernels

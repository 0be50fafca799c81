// column_select.h on a stream, in two launches; all pointers are the device's, and nothing waits for the host.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/element_type.h"
#include "kernels/moe_pairs_cuda.h"
#include "kernels/row_sort_cuda.h"

namespace d2moe::kernels {

// How many parts the rows of X [num_rows, in] are summed in: as many as keep the GPU busy.
int64_t column_square_parts(int64_t num_rows, int64_t in, int num_processors);

// squares[j] = sum over rows of X[row, j]^2 in float64, added up in an order that depends on the sizes alone.
// `partial` [num_parts, in] float64 and `counters` [in] int32, zeroed, are scratch; neither is used if num_parts is 1.
cudaError_t launch_column_squares(const void* x, ElementType type, int64_t num_rows, int64_t in, int64_t row_stride,
                                  int64_t num_parts, double* partial, int32_t* counters, double* squares,
                                  cudaStream_t stream);

// squares[base, j] likewise over the rows that each base multiplies: row r of base_rows is row r / rows_per_x of X.
// `sorted` are those rows by base, or null where they are few or one base has them all. `partial` [num_bases,
// num_parts, in], `counters` [num_bases, in].
struct BaseSquares {
  const void* x;
  ElementType type;
  int64_t in;
  int64_t row_stride;
  int32_t rows_per_x;
  MoePairs pairs;
  BaseRows base_rows;
  const SortedRows* sorted;
  int64_t num_parts;
  double* partial;
  int32_t* counters;
  double* squares;  // [num_bases, in]
};
cudaError_t launch_base_column_squares(const BaseSquares& arguments, cudaStream_t stream);

// scores[j] = column_norms[j] * sqrt(squares[columns[j]]), and the positions of the `keep` largest, ascending; NaN
// counts as +infinity, of equal scores the lower position wins, and a column that `squares` [in] does not have scores
// 0. For num_groups of each, one after the other.
cudaError_t launch_column_select(int64_t num_groups, const double* squares, int64_t in, const float* column_norms,
                                 const int32_t* columns, int64_t num_columns, int64_t keep, float* scores,
                                 int32_t* selected, cudaStream_t stream);

}  // namespace d2moe::kernels

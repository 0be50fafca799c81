// The sums over a token's experts, with the router's weight g of each pair, in float32, in slot order, rounded once:
//
//   sum_base_inputs   z[row]  = sum over the pairs of a (token, base) of g h[pair], at the base's columns: what down's
//   base,
//                               which is linear, multiplies instead of every h
//   sum_experts       y[t]    = sum over t's base rows of base_output + sum over its pairs of g (delta_output + bias)
//
// One output row is summed by one thread, so results do not depend on how rows are split over threads.
#pragma once

#include <cstdint>

#include "kernels/element_type.h"
#include "kernels/moe_routing.h"

namespace d2moe::kernels {

// For row_begin <= row < row_end, numbered as in `routing`; z [., num_columns] begins with row z_row_offset.
// activated [., row_stride] holds pair p in row activated_rows[p] (nullptr: row p). weights [T * k].
// columns == nullptr means columns[j] == j.
void sum_base_inputs(const MoeRouting& routing, const void* activated, ElementType type, int64_t row_stride,
                     const int64_t* activated_rows, const float* weights, const int32_t* columns, int64_t num_columns,
                     int64_t row_begin, int64_t row_end, int64_t z_row_offset, void* z);

struct ExpertOutputs {
  ElementType type;          // of all outputs and the bias
  int64_t width;             // H
  const float* weights;      // [T * k]
  const void* base_output;   // [base rows, width]
  bool base_is_weighted;     // base_output was computed from weighted sums; otherwise there is one row per pair
  const void* delta_output;  // [., width]
  const int64_t* delta_row;  // [T * k], -1: the pair has none
  const void* bias;          // [E, width], or nullptr: zero
};

// output [T, width], rows token_begin to token_end.
void sum_experts(const MoeRouting& routing, const ExpertOutputs& outputs, int64_t token_begin, int64_t token_end,
                 void* output);

}  // namespace d2moe::kernels

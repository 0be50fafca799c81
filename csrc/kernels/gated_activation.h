// What becomes of the products of one expert's pairs, each step in float32 and rounded once, at the end:
//
//   combine_rows       out = base row + delta + bias
//   gated_activation   out = act(gate) * up of that row,   or act(up) where there is no gate
//
// A pair's base row is shared with other pairs of its token, so it is read here rather than copied for each of them.
#pragma once

#include <cstdint>

#include "kernels/element_type.h"

namespace d2moe::kernels {

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu2 };

// Row i of an expert: the sum of base[base_rows[i] - base_row_offset], the deltas' rows i side by side, and the bias.
struct CombinedRows {
  ElementType type;            // of base, deltas, bias and the output
  int64_t width;               // of a row: R
  const void* base;            // [base rows, width]
  const int64_t* base_rows;    // [rows]
  int64_t base_row_offset;     // the number of the base row that `base` begins with
  const void* deltas[2];       // [rows, delta_widths[d]], or nullptr: zero
  int64_t delta_widths[2];     // columns 0 to delta_widths[0], then delta_widths[1] more
  const void* bias;            // [width], or nullptr: zero
  const int64_t* output_rows;  // [rows]: where each row of the output goes
};

// output [., width], row output_rows[i] for row_begin <= i < row_end.
void combine_rows(const CombinedRows& rows, int64_t row_begin, int64_t row_end, void* output);

// output [., width / 2] if gated, else [., width]. A gated row is [gate; up], or gate0, up0, gate1, up1, ... if
// interleaved.
void gated_activation(const CombinedRows& rows, Activation activation, bool gated, bool interleaved, int64_t row_begin,
                      int64_t row_end, void* output);

}  // namespace d2moe::kernels

// Products of a weight matrix [out, in] with a few or many rows x, in float32, added to what stands in the output:
//
//   multiply_rows       out[m][n] += sum_k x[m][k] W[n][k]             W by row: the channels of an output contiguous
//   multiply_channels   out[m][n] += sum_j x[m][j] W[channels[j]][n]   W by channel: the outputs of a channel
//   contiguous
//
// Rows are dot products and read all of W; by channel, what is not listed is not read. Both read each weight once and
// convert it in registers. A row's result depends on x, W, the instruction set and how many rows there are, but not on
// the thread or on which outputs a call covers, if it begins at a multiple of kOutputStep.
#pragma once

#include <cstdint>

#include "kernels/element_type.h"

namespace d2moe::kernels {

struct RowProduct {
  const void* weights;  // row n at n * stride elements
  int64_t stride;
  int64_t num_inputs;    // K
  const void* const* x;  // [num_rows] pointers to K elements of the kernels' input_type
  int64_t num_rows;      // M
  int64_t begin, end;    // the outputs computed
  float* const* out;     // [num_rows] pointers; out[m][0] is output `begin`. Two may be equal.
};

struct ChannelProduct {
  const void* weights;  // channel j at j * stride elements
  int64_t stride;
  int64_t num_inputs;
  const int32_t* channels;  // [num_inputs], or nullptr: 0 to num_inputs - 1
  const void* const* x;     // x[m][j] belongs to channels[j]
  int64_t num_rows;
  int64_t begin, end;
  float* const* out;
};

// Outputs are shared out in multiples of this.
constexpr int64_t kOutputStep = 32;

struct ProductKernels {
  const char* instruction_set;
  ElementType input_type;  // of x: bfloat16 where there are instructions for its products, else float32
  void (*multiply_rows)(const RowProduct&);
  void (*multiply_channels)(const ChannelProduct&);
};

// "avx512_bf16", "avx512", "avx2", "portable", as far as this CPU has them, fastest first; nullptr ends the list.
const char* const* instruction_sets();

// The kernels for weights of a forward type; nullptr for an instruction set that is not in the list above.
const ProductKernels* product_kernels(const char* instruction_set, ElementType weights);

// Those of the instruction set in use: the fastest one, unless another was chosen.
const ProductKernels& product_kernels(ElementType weights);

// For tests and benchmarks; false, and no change, for one that is not in the list. Not while products are computed.
bool use_instruction_set(const char* instruction_set);

// One file each.
const ProductKernels* product_kernels_avx512_bf16(ElementType weights);
const ProductKernels* product_kernels_avx512(ElementType weights);
const ProductKernels* product_kernels_avx2(ElementType weights);
const ProductKernels* product_kernels_portable(ElementType weights);

}  // namespace d2moe::kernels

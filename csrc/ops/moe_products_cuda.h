// The products of moe_forward on a GPU: nothing waits for the host, and sizes depend on shapes alone, so that a call
// can be captured in a CUDA graph.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/moe_forward.h"
#include "ops/pairs_call_cuda.h"

namespace d2moe {

// Rows of x: row r of what is multiplied is row r / rows_per_x of it.
struct CudaSource {
  at::Tensor x;  // contiguous
  int32_t rows_per_x;
};

// base[b] x of every row of `rows`: [rows, out]; rows that no base multiplies hold anything.
at::Tensor base_products(PairsCall& call, const BaseGroup& group, const kernels::BaseRows& rows,
                         const CudaSource& source);

// base[b] x + U (V x) + bias of every pair, in out [num_pairs, out_features], whose other rows are left as they are.
void pair_products(PairsCall& call, const BaseGroup& group, const kernels::BaseRows& rows, at::ArrayRef<Delta> deltas,
                   const CudaSource& source, const at::Tensor& out);

// U (V x) of every pair: [num_pairs, out_features].
at::Tensor delta_products(PairsCall& call, const Delta& delta, const CudaSource& source);

}  // namespace d2moe

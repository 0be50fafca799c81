// out = left @ right for the operators of the forward.
#pragma once

#include <ATen/core/Tensor.h>

namespace d2moe {

// left [m, n], right [n, p] (any strides), out [m, p] with contiguous rows, all of one forward dtype. Accumulates in
// float32 and rounds once. n == 0 gives zeros. Workspace is bounded whatever the sizes are.
void matmul_out(const at::Tensor& out, const at::Tensor& left, const at::Tensor& right);

// out += left @ right, the same way.
void matmul_add(const at::Tensor& out, const at::Tensor& left, const at::Tensor& right);

}  // namespace d2moe

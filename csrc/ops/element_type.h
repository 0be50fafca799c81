// A tensor's dtype as the kernels know it.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "kernels/element_type.h"

namespace d2moe {

inline bool is_float_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
}

inline kernels::ElementType element_type(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return kernels::ElementType::kFloat32;
    case at::kDouble:
      return kernels::ElementType::kFloat64;
    case at::kBFloat16:
      return kernels::ElementType::kBFloat16;
    case at::kHalf:
      return kernels::ElementType::kFloat16;
    default:
      TORCH_INTERNAL_ASSERT(false, "the operator checks its dtypes first, got ", tensor.scalar_type());
  }
}

}  // namespace d2moe

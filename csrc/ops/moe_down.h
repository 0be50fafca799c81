// The weighted half of moe_forward.
#pragma once

#include "ops/moe_products.h"

namespace d2moe {

// y [T, H] = sum over experts of weight * down(h), into `output`. weighted: weight * h of each sorted pair, `width`
// wide, in the input type of the products; weights [T * k], for the bias. delta may be nullptr.
void weighted_down(Rows weighted, int64_t width, const kernels::MoeRouting& routing, const float* weights,
                   const BaseGroup& group, const Delta* delta, const at::Tensor& output);

}  // namespace d2moe

// The two sums of the Fisher-weighted mean of the experts (paper eqs. 4 and 5), one expert and one sequence at a time:
//
//   F = scale * gradient^2,   weighted_sum += F * weight,   fisher_sum += F        (all elementwise, [count])
//
// One pass over memory: F is never stored.
#pragma once

#include <cstdint>

#include "kernels/element_type.h"

namespace d2moe::kernels {

// Elements [begin, end). `accumulators` is the type of both sums and of the arithmetic: kFloat32 or kFloat64.
void fisher_merge(void* weighted_sum, void* fisher_sum, ElementType accumulators, const void* weight,
                  ElementType weight_type, const void* gradient, ElementType gradient_type, double scale, int64_t begin,
                  int64_t end);

}  // namespace d2moe::kernels

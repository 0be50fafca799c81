#include "kernels/fisher_merge.h"

#include <algorithm>

namespace d2moe::kernels {

namespace {

// Weights and gradients are converted block by block in the first-level cache, so that two small loops serve every
// pair of element types.
constexpr int64_t kBlock = 1024;

template <typename Accumulator>
void convert(const void* data, ElementType type, int64_t begin, int64_t count, Accumulator* __restrict__ out) {
  visit_elements(data, type, [&](const auto* elements) {
    const auto* __restrict__ source = elements + begin;
    for (int64_t i = 0; i < count; ++i) {
      out[i] = static_cast<Accumulator>(to_float(source[i]));
    }
  });
}

template <typename Accumulator>
void merge(Accumulator* weighted_sum, Accumulator* fisher_sum, const void* weight, ElementType weight_type,
           const void* gradient, ElementType gradient_type, Accumulator scale, int64_t begin, int64_t end) {
  Accumulator weights[kBlock];
  Accumulator gradients[kBlock];
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t count = std::min(kBlock, end - start);
    convert(weight, weight_type, start, count, weights);
    convert(gradient, gradient_type, start, count, gradients);
    Accumulator* __restrict__ weighted = weighted_sum + start;
    Accumulator* __restrict__ fishers = fisher_sum + start;
    for (int64_t i = 0; i < count; ++i) {
      const Accumulator fisher = scale * gradients[i] * gradients[i];
      weighted[i] += fisher * weights[i];
      fishers[i] += fisher;
    }
  }
}

}  // namespace

void fisher_merge(void* weighted_sum, void* fisher_sum, ElementType accumulators, const void* weight,
                  ElementType weight_type, const void* gradient, ElementType gradient_type, double scale, int64_t begin,
                  int64_t end) {
  if (accumulators == ElementType::kFloat64) {
    merge(static_cast<double*>(weighted_sum), static_cast<double*>(fisher_sum), weight, weight_type, gradient,
          gradient_type, scale, begin, end);
  } else {
    merge(static_cast<float*>(weighted_sum), static_cast<float*>(fisher_sum), weight, weight_type, gradient,
          gradient_type, static_cast<float>(scale), begin, end);
  }
}

}  // namespace d2moe::kernels

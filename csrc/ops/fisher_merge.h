// What fisher_merge_ does on every device: its checks, and contiguous memory for the kernels.
#pragma once

#include <ATen/core/Tensor.h>

namespace d2moe {

// Raises a sentence that names the argument, the rule and what was given.
void check_fisher_merge(const at::Tensor& weighted_sum, const at::Tensor& fisher_sum, const at::Tensor& weight,
                        const at::Tensor& gradient, double scale);

// Calls merge(weighted_sum, fisher_sum, weight, gradient) with four tensors whose elements stand in the same order, one
// after the other, and copies the sums back where they were not so.
template <typename Merge>
void merge_in_order(const at::Tensor& weighted_sum, const at::Tensor& fisher_sum, const at::Tensor& weight,
                    const at::Tensor& gradient, Merge&& merge) {
  // A model may hold its weights transposed: four transposed views in step are as good as four plain matrices.
  const auto all = [&](auto&& holds) {
    return holds(weighted_sum) && holds(fisher_sum) && holds(weight) && holds(gradient);
  };
  if (all([](const at::Tensor& tensor) { return tensor.t().is_contiguous(); })) {
    return merge(weighted_sum.t(), fisher_sum.t(), weight.t(), gradient.t());
  }
  const at::Tensor weighted = weighted_sum.contiguous();
  const at::Tensor fishers = fisher_sum.contiguous();
  merge(weighted, fishers, weight.contiguous(), gradient.contiguous());
  if (!weighted.is_same(weighted_sum)) {
    weighted_sum.copy_(weighted);
  }
  if (!fishers.is_same(fisher_sum)) {
    fisher_sum.copy_(fishers);
  }
}

}  // namespace d2moe

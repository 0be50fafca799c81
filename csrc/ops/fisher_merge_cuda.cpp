// fisher_merge_ on a GPU.
#include "kernels/fisher_merge_cuda.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "ops/cuda_context.h"
#include "ops/element_type.h"
#include "ops/fisher_merge.h"

namespace d2moe {

namespace {

void fisher_merge_cuda(at::Tensor& weighted_sum, at::Tensor& fisher_sum, const at::Tensor& weight,
                       const at::Tensor& gradient, double scale) {
  const at::AutoDispatchBelowAutograd guard;
  check_fisher_merge(weighted_sum, fisher_sum, weight, gradient, scale);
  const CudaContext context(weighted_sum);
  merge_in_order(
      weighted_sum, fisher_sum, weight, gradient,
      [&](const at::Tensor& weighted, const at::Tensor& fishers, const at::Tensor& weights, const at::Tensor& grads) {
        check_cuda(kernels::launch_fisher_merge(weighted.data_ptr(), fishers.data_ptr(), element_type(weighted),
                                                weights.const_data_ptr(), element_type(weights), grads.const_data_ptr(),
                                                element_type(grads), scale, weighted.numel(), context.stream()));
      });
}

}  // namespace

TORCH_LIBRARY_IMPL(d2moe_ext, D2MOE_CUDA_KEY, m) { m.impl("fisher_merge_", &fisher_merge_cuda); }

}  // namespace d2moe

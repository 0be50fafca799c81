// Adds one expert's and one sequence's share to the sums of the Fisher-weighted mean (paper eqs. 4 and 5):
//
//   F = scale * gradient^2,   weighted_sum += F * weight,   fisher_sum += F        (all [out, in])
#include "ops/fisher_merge.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cmath>

#include "kernels/fisher_merge.h"
#include "ops/checks.h"
#include "ops/element_type.h"

namespace d2moe {

namespace {

constexpr const char* kOp = "fisher_merge_";
constexpr int64_t kGrain = 1 << 15;  // elements a thread takes at least: some ten microseconds of work

void merge_contiguous(const at::Tensor& weighted_sum, const at::Tensor& fisher_sum, const at::Tensor& weight,
                      const at::Tensor& gradient, double scale) {
  void* weighted = weighted_sum.data_ptr();
  void* fishers = fisher_sum.data_ptr();
  at::parallel_for(0, weighted_sum.numel(), kGrain, [&](int64_t begin, int64_t end) {
    kernels::fisher_merge(weighted, fishers, element_type(weighted_sum), weight.const_data_ptr(), element_type(weight),
                          gradient.const_data_ptr(), element_type(gradient), scale, begin, end);
  });
}

void fisher_merge_cpu(at::Tensor& weighted_sum, at::Tensor& fisher_sum, const at::Tensor& weight,
                      const at::Tensor& gradient, double scale) {
  const at::AutoDispatchBelowAutograd guard;
  check_fisher_merge(weighted_sum, fisher_sum, weight, gradient, scale);
  merge_in_order(weighted_sum, fisher_sum, weight, gradient,
                 [&](const auto&... tensors) { merge_contiguous(tensors..., scale); });
}

}  // namespace

void check_fisher_merge(const at::Tensor& weighted_sum, const at::Tensor& fisher_sum, const at::Tensor& weight,
                        const at::Tensor& gradient, double scale) {
  D2MOE_CHECK_DIM(kOp, weighted_sum, 2);
  TORCH_CHECK(is_compression_dtype(weighted_sum.scalar_type()), kOp, ": weighted_sum must be float32 or float64, got ",
              weighted_sum.scalar_type());
  const int64_t out = weighted_sum.size(0), in = weighted_sum.size(1);
  D2MOE_CHECK_SHAPE(kOp, fisher_sum, out, in);
  D2MOE_CHECK_SHAPE(kOp, weight, out, in);
  D2MOE_CHECK_SHAPE(kOp, gradient, out, in);
  D2MOE_CHECK_DTYPE(kOp, fisher_sum, weighted_sum.scalar_type());
  TORCH_CHECK(is_float_dtype(weight.scalar_type()), kOp, ": weight must be of a floating dtype, got ",
              weight.scalar_type());
  TORCH_CHECK(is_float_dtype(gradient.scalar_type()), kOp, ": gradient must be of a floating dtype, got ",
              gradient.scalar_type());
  D2MOE_CHECK_DEVICE(kOp, fisher_sum, weighted_sum);
  D2MOE_CHECK_DEVICE(kOp, weight, weighted_sum);
  D2MOE_CHECK_DEVICE(kOp, gradient, weighted_sum);
  TORCH_CHECK(std::isfinite(scale) && scale >= 0, kOp, ": scale must be finite and not negative, got ", scale);
  const at::MemOverlapStatus overlap = at::get_overlap_status(weighted_sum, fisher_sum);
  TORCH_CHECK(overlap != at::MemOverlapStatus::Full && overlap != at::MemOverlapStatus::Partial, kOp,
              ": fisher_sum must not share memory with weighted_sum, got overlapping tensors");
}

TORCH_LIBRARY_FRAGMENT(d2moe_ext, m) {
  m.def(
      "fisher_merge_(Tensor(a!) weighted_sum, Tensor(b!) fisher_sum, Tensor weight, Tensor gradient, float scale) "
      "-> ()");
}

TORCH_LIBRARY_IMPL(d2moe_ext, CPU, m) { m.impl("fisher_merge_", &fisher_merge_cpu); }

}  // namespace d2moe

// The arguments of moe_forward as its kernels read them.
#include <ATen/Parallel.h>

#include <algorithm>

#include "ops/moe_forward.h"

namespace d2moe {

BaseGroup with_contiguous_lists(BaseGroup group) {
  const auto contiguous = [](const std::optional<at::Tensor>& tensor) {
    return tensor.has_value() ? std::optional<at::Tensor>(tensor->contiguous()) : std::nullopt;
  };
  group.columns = contiguous(group.columns);
  group.column_norms = contiguous(group.column_norms);
  group.bias = contiguous(group.bias);
  group.expert_to_base = group.expert_to_base.contiguous();
  if (group.base.stride(2) != 1 && group.base.stride(1) != 1) {
    group.base = group.base.contiguous();
  }
  return group;
}

std::vector<Delta> with_contiguous_lists(std::vector<Delta> deltas) {
  for (Delta& delta : deltas) {
    for (at::Tensor* tensor : {&delta.u, &delta.v, &delta.rank, &delta.u_start, &delta.v_start}) {
      *tensor = tensor->contiguous();
    }
    for (std::optional<at::Tensor>* tensor : {&delta.pivots, &delta.u_scale, &delta.v_scale}) {
      if (tensor->has_value()) {
        *tensor = (*tensor)->contiguous();
      }
    }
  }
  return deltas;
}

kernels::MoeRouting route(const at::Tensor& top_k_index, const BaseGroup& group, bool force_one_row_per_pair) {
  const at::Tensor ids = top_k_index.contiguous();
  const auto route_ids = [&](const auto* data) {
    return kernels::route_pairs(data, ids.size(0), ids.size(1), group.expert_to_base.const_data_ptr<int32_t>(),
                                group.num_experts(), group.num_bases(), force_one_row_per_pair);
  };
  return ids.scalar_type() == at::kInt ? route_ids(ids.const_data_ptr<int32_t>())
                                       : route_ids(ids.const_data_ptr<int64_t>());
}

void parallel_rows(int64_t num_rows, int64_t row_width, const std::function<void(int64_t, int64_t)>& function) {
  constexpr int64_t kElementsPerThread = 16384;
  at::parallel_for(0, num_rows, std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, row_width)), function);
}

}  // namespace d2moe

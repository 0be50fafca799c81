// What the stages of a forward on a GPU share: the call's pairs, and rows in order of their group.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <utility>
#include <vector>

#include "kernels/moe_pairs_cuda.h"
#include "kernels/row_sort_cuda.h"
#include "ops/cuda_context.h"
#include "ops/moe_forward.h"

namespace d2moe {

// Rows by group, and the tensors they lie in.
struct SortedGroups {
  at::Tensor order, offsets, tiles;
  at::Tensor position;  // only where it was asked for
  kernels::SortedRows rows;
};

// What the stages of one call share: its pairs and their order.
class PairsCall {
 public:
  // input: of the forward's dtype.
  PairsCall(const char* op, const at::Tensor& input, const at::Tensor& top_k_index, int64_t num_experts);

  // Rows that the bases of a group multiply: each pair by itself if `per_pair`.
  kernels::BaseRows base_rows(const BaseGroup& group, bool per_pair) const;

  // Sorts whatever the products below need, in one launch: pairs by expert if `experts`, and the rows of these bases.
  // Few tokens are not sorted. `positions`: also each base row's place. Call once.
  void sort(bool experts, const std::vector<kernels::BaseRows>& base_rows, bool positions = false);

  const kernels::SortedRows* by_expert() const { return experts_ ? &experts_->rows : nullptr; }
  const kernels::SortedRows* by_base(const kernels::BaseRows& rows) const;
  const SortedGroups* groups_of(const kernels::BaseRows& rows) const;

  at::Tensor empty(int64_t rows, int64_t width) const;
  // Zero before and after every product.
  at::Tensor counters(int64_t count);

  const CudaContext context;
  const at::TensorOptions options;
  const kernels::ElementType type;
  const at::Tensor top_k_index;
  const kernels::MoePairs pairs;

 private:
  SortedGroups sorted_groups(int64_t num_rows, int64_t num_groups, bool positions) const;

  const char* op_;
  std::optional<SortedGroups> experts_;
  std::vector<std::pair<kernels::BaseRows, SortedGroups>> bases_;
  at::Tensor counters_;
};

}  // namespace d2moe

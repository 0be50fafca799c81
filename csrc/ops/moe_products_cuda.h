// The products of moe_forward on a GPU: nothing waits for the host, and sizes depend on shapes alone, so that a call
// can be captured in a CUDA graph.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "kernels/grouped_product_cuda.h"
#include "kernels/moe_pairs_cuda.h"
#include "kernels/row_sort_cuda.h"
#include "ops/cuda_context.h"
#include "ops/moe_forward.h"

namespace d2moe {

// Rows by group, and the tensors they lie in.
struct SortedGroups {
  at::Tensor order, offsets, tiles;
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
  // Few tokens are not sorted. Call once.
  void sort(bool experts, const std::vector<kernels::BaseRows>& base_rows);

  const kernels::SortedRows* by_expert() const { return experts_ ? &experts_->rows : nullptr; }
  const kernels::SortedRows* by_base(const kernels::BaseRows& rows) const;

  at::Tensor empty(int64_t rows, int64_t width) const;
  // Zero before and after every product.
  at::Tensor counters(int64_t count);

  const CudaContext context;
  const at::TensorOptions options;
  const kernels::ElementType type;
  const at::Tensor top_k_index;
  const kernels::MoePairs pairs;

 private:
  SortedGroups sorted_groups(int64_t num_rows, int64_t num_groups) const;

  const char* op_;
  std::optional<SortedGroups> experts_;
  std::vector<std::pair<kernels::BaseRows, SortedGroups>> bases_;
  at::Tensor counters_;
};

// Rows of x: row r of what is multiplied is row r / rows_per_x of it.
struct CudaSource {
  at::Tensor x;  // contiguous
  int32_t rows_per_x;
};

// base[b] x of every row of `rows`: [rows, out]; rows that no base multiplies hold anything.
at::Tensor base_products(PairsCall& call, const BaseGroup& group, const kernels::BaseRows& rows,
                         const CudaSource& source);

// base[b] x + U (V x) + bias of every pair, in out [num_pairs, out_features], whose other rows are left as they are.
void pair_products(PairsCall& call, const BaseGroup& group, const kernels::BaseRows& rows, at::ArrayRef<Delta> deltas,
                   const CudaSource& source, const at::Tensor& out);

// U (V x) of every pair: [num_pairs, out_features].
at::Tensor delta_products(PairsCall& call, const Delta& delta, const CudaSource& source);

}  // namespace d2moe

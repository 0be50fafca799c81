// What the files of moe_forward share: its arguments in groups, and their checks.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/gated_activation.h"
#include "kernels/moe_routing.h"
#include "ops/element_type.h"

namespace d2moe {

// The bases of one input group, gate_up or down: [K, out, in_kept] and what goes with them.
struct BaseGroup {
  const char* name;  // "gate_up" or "down", for messages
  at::Tensor base;
  std::optional<at::Tensor> columns;
  std::optional<at::Tensor> column_norms;
  at::Tensor expert_to_base;
  int64_t keep;
  std::optional<at::Tensor> bias;

  int64_t num_bases() const { return base.size(0); }
  int64_t out_features() const { return base.size(1); }
  int64_t kept() const { return base.size(2); }
  int64_t num_experts() const { return expert_to_base.size(0); }
  bool prunes_dynamically() const { return keep < kept(); }
};

// The low-rank deltas of one projection: U[e] = u[u_start[e] : u_start[e] + rank[e]].T, V[e] likewise without the
// transpose. With pivots the factors are gauge-fixed: columns pivots[u_start[e] : u_start[e] + rank[e]] of V[e] are an
// identity that is not stored, and its other columns, [rank, in - rank], stand in v from element v_start[e] on.
// With scales u and v are int8, and a row is its scale times what is stored: v's scales stand beside its rows, or from
// u_start[e] on where there are pivots.
struct Delta {
  const char* op;  // this and the next for messages
  size_t index;    // in the operator's lists
  at::Tensor u;
  at::Tensor v;
  at::Tensor rank;
  at::Tensor u_start;
  at::Tensor v_start;
  std::optional<at::Tensor> pivots;
  std::optional<at::Tensor> u_scale;  // both or none
  std::optional<at::Tensor> v_scale;

  int64_t in_features() const { return v.size(1); }
  int64_t rank_of(int64_t expert) const { return rank.const_data_ptr<int32_t>()[expert]; }
  const int32_t* pivots_of(int64_t expert) const {
    return pivots->const_data_ptr<int32_t>() + u_start.const_data_ptr<int32_t>()[expert];
  }
};

// pivots: as many as u, or none where V is stored whole; scales: as many as u, or none where factors are floating.
std::vector<Delta> make_deltas(const char* op, at::TensorList u, at::TensorList v, at::TensorList rank,
                               at::TensorList u_start, at::TensorList v_start, at::TensorList pivots,
                               at::TensorList u_scale, at::TensorList v_scale);

// Checks of shapes, dtypes and devices, which need no tensor's values and so hold on every device.
void check_input(const char* op, const char* name, const at::Tensor& input);
void check_routing(const char* op, const at::Tensor& top_k_index, const at::Tensor& input, const char* input_name);
void check_weights(const char* op, const at::Tensor& top_k_weights, const at::Tensor& top_k_index);
void check_base_group(const char* op, const BaseGroup& group, const at::Tensor& input, int64_t in_features);
// The deltas of one group: one over all its rows, or two over half of them each.
void check_deltas(const char* op, const BaseGroup& group, at::ArrayRef<Delta> deltas, const at::Tensor& input,
                  int64_t in_features);

// Checks of everything that is read as an index, for tensors the CPU can read.
void check_base_group_indices(const char* op, const BaseGroup& group, int64_t in_features);
void check_delta_indices(const char* op, at::ArrayRef<Delta> deltas);

// Refuses pivots of an expert that do not ascend or are out of range.
void check_pivots(const Delta& delta, int64_t expert);

// Contiguous copies of what is read by pointer, where it is not contiguous already.
BaseGroup with_contiguous_lists(BaseGroup group);
std::vector<Delta> with_contiguous_lists(std::vector<Delta> deltas);

kernels::Activation parse_activation(const char* op, std::string_view activation);

kernels::MoeRouting route(const at::Tensor& top_k_index, const BaseGroup& group, bool force_one_row_per_pair);

// Calls function(begin, end) on ranges of rows in parallel, each thread with some 16k elements at least.
void parallel_rows(int64_t num_rows, int64_t row_width, const std::function<void(int64_t, int64_t)>& function);

}  // namespace d2moe

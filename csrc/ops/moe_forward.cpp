// moe_forward, moe_gate_up_forward, moe_down_forward: schemas and CPU implementations (arguments:
// d2moe_ext/ops/moe_forward.py).
//
//   gate_up[t, e] = base[b] x[t, P] + U[e] (V[e] x[t]) + bias[e]       [T * k, R], base once per (token, base)
//   h[t, e]       = act(gate) * up, or act(up)                         [T * k, I]
//   y[t]          = sum_b base[b] (sum_{e of b} g h[t, e])[P] + sum_e g (U[e] (V[e] h[t, e]) + bias[e])      [T, H]
#include "ops/moe_forward.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <string_view>

#include "kernels/row_conversion.h"
#include "ops/moe_down.h"
#include "ops/moe_forward_plan.h"
#include "ops/moe_pairs.h"

namespace d2moe {

namespace {

// Index lists as the kernels read them: contiguous, and every value in range.
void prepare_indices(const char* op, BaseGroup& group, int64_t in_features) {
  group = with_contiguous_lists(std::move(group));
  check_base_group_indices(op, group, in_features);
}

void prepare_indices(const char* op, std::vector<Delta>& deltas) {
  deltas = with_contiguous_lists(std::move(deltas));
  check_delta_indices(op, deltas);
}

at::Tensor moe_forward_cpu(const at::Tensor& hidden_states, const at::Tensor& top_k_index,
                           const at::Tensor& top_k_weights, const at::Tensor& gate_up_base,
                           const std::optional<at::Tensor>& gate_up_columns,
                           const std::optional<at::Tensor>& gate_up_column_norms,
                           const at::Tensor& gate_up_expert_to_base, int64_t gate_up_keep,
                           const std::optional<at::Tensor>& gate_up_bias, const at::Tensor& down_base,
                           const std::optional<at::Tensor>& down_columns,
                           const std::optional<at::Tensor>& down_column_norms, const at::Tensor& down_expert_to_base,
                           int64_t down_keep, const std::optional<at::Tensor>& down_bias, at::TensorList delta_u,
                           at::TensorList delta_v, at::TensorList delta_rank, at::TensorList delta_u_start,
                           at::TensorList delta_v_start, at::TensorList delta_pivots, at::TensorList delta_u_scale,
                           at::TensorList delta_v_scale, std::string_view activation, bool interleaved) {
  BaseGroup gate_up{"gate_up",    gate_up_base, gate_up_columns, gate_up_column_norms, gate_up_expert_to_base,
                    gate_up_keep, gate_up_bias};
  BaseGroup down{"down", down_base, down_columns, down_column_norms, down_expert_to_base, down_keep, down_bias};
  std::vector<Delta> deltas = make_deltas(kMoeForward, delta_u, delta_v, delta_rank, delta_u_start, delta_v_start,
                                          delta_pivots, delta_u_scale, delta_v_scale);
  const kernels::Activation act = parse_activation(kMoeForward, activation);
  const ForwardPlan plan =
      check_moe_forward(hidden_states, top_k_index, top_k_weights, gate_up, down, deltas, interleaved);
  prepare_indices(kMoeForward, gate_up, hidden_states.size(1));
  prepare_indices(kMoeForward, down, plan.intermediate_size);
  prepare_indices(kMoeForward, deltas);

  // h stands in the order that down reads it in, which is gate_up's unless their experts share bases differently.
  const bool same_bases =
      gate_up.num_bases() == down.num_bases() && at::equal(gate_up.expert_to_base, down.expert_to_base);
  const kernels::MoeRouting gate_up_routing = route(top_k_index, gate_up, false);
  const kernels::MoeRouting own_routing = same_bases ? kernels::MoeRouting() : route(top_k_index, down, false);
  const kernels::MoeRouting& down_routing = same_bases ? gate_up_routing : own_routing;
  const Workspace::Frame frame(workspace());
  const kernels::ElementType input_type = kernels::product_kernels(element_type(hidden_states)).input_type;
  const at::Tensor x = hidden_states.contiguous(), weights = top_k_weights.to(at::kFloat).contiguous();
  const float* weight = weights.const_data_ptr<float>();
  const int64_t num_pairs = static_cast<int64_t>(down_routing.sorted_pair.size());
  const OwnRows weighted(num_pairs, plan.intermediate_size, input_type);
  const auto activate = [&](const PairSums& sums) {
    const int64_t count = sums.end - sums.begin;
    for (int64_t m = 0; m < sums.num_rows; ++m) {
      const int64_t pair = gate_up_routing.sorted_pair[sums.first + m];
      if (plan.gated) {
        kernels::gated_activation(act, count, interleaved, weight[pair], sums.sums[m]);
      } else {
        kernels::activation(act, count, weight[pair], sums.sums[m]);
      }
      auto* row = static_cast<std::byte*>(weighted[down_routing.position_of_pair[pair]]);
      kernels::store_row(sums.sums[m], count, input_type, row + sums.begin * size_of(input_type));
    }
  };
  const OutputOrder order = !plan.gated   ? OutputOrder::kPlain
                            : interleaved ? OutputOrder::kAlternating
                                          : OutputOrder::kHalves;
  const at::ArrayRef<Delta> all_deltas(deltas);
  multiply_pairs({rows_of(x, input_type), x.size(1), false}, gate_up_routing, gate_up,
                 all_deltas.slice(0, plan.num_gate_up_deltas), order, activate);
  at::Tensor output = at::empty_like(x);
  weighted_down(weighted, plan.intermediate_size, down_routing, weight, down, deltas.empty() ? nullptr : &deltas.back(),
                output);
  return output;
}

// base + delta + bias of every pair; rows of ids that are no expert stay 0.
at::Tensor combine_pairs(const at::Tensor& source, bool row_per_pair, const at::Tensor& top_k_index,
                         const BaseGroup& group, at::ArrayRef<Delta> deltas) {
  const kernels::MoeRouting routing = route(top_k_index, group, row_per_pair);
  const at::Tensor output = at::zeros({top_k_index.numel(), group.out_features()}, source.options());
  const Workspace::Frame frame(workspace());
  const kernels::ElementType type = element_type(source);
  const at::Tensor x = source.contiguous();
  auto* elements = static_cast<std::byte*>(output.mutable_data_ptr());
  const auto store = [&](const PairSums& sums) {
    for (int64_t m = 0; m < sums.num_rows; ++m) {
      const int64_t pair = routing.sorted_pair[sums.first + m];
      kernels::store_row(sums.sums[m], sums.end - sums.begin, type,
                         elements + (pair * group.out_features() + sums.begin) * size_of(type));
    }
  };
  multiply_pairs({rows_of(x, kernels::product_kernels(type).input_type), x.size(1), row_per_pair}, routing, group,
                 deltas, OutputOrder::kPlain, store);
  return output;
}

// weight * h of each sorted pair.
Rows weighted_rows(const at::Tensor& activated, const kernels::MoeRouting& routing, const float* weights,
                   kernels::ElementType input_type) {
  const int64_t width = activated.size(1);
  const kernels::ElementType type = element_type(activated);
  const auto* elements = static_cast<const std::byte*>(activated.const_data_ptr());
  const int64_t num_pairs = static_cast<int64_t>(routing.sorted_pair.size());
  const OwnRows rows(num_pairs, width, input_type);
  parallel_rows(num_pairs, width, [&](int64_t begin, int64_t end) {
    const Workspace::Frame frame(workspace());
    float* row = workspace().take<float>(width);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t pair = routing.sorted_pair[i];
      std::fill_n(row, width, 0.0f);
      kernels::add_row(elements + pair * width * size_of(type), type, weights[pair], nullptr, width, row);
      kernels::store_row(row, width, input_type, rows[i]);
    }
  });
  return rows;
}

at::Tensor moe_gate_up_forward_cpu(const at::Tensor& hidden_states, const at::Tensor& top_k_index,
                                   const at::Tensor& gate_up_base, const std::optional<at::Tensor>& gate_up_columns,
                                   const std::optional<at::Tensor>& gate_up_column_norms,
                                   const at::Tensor& gate_up_expert_to_base, int64_t gate_up_keep,
                                   const std::optional<at::Tensor>& gate_up_bias, at::TensorList delta_u,
                                   at::TensorList delta_v, at::TensorList delta_rank, at::TensorList delta_u_start,
                                   at::TensorList delta_v_start, at::TensorList delta_pivots,
                                   at::TensorList delta_u_scale, at::TensorList delta_v_scale) {
  BaseGroup gate_up{"gate_up",    gate_up_base, gate_up_columns, gate_up_column_norms, gate_up_expert_to_base,
                    gate_up_keep, gate_up_bias};
  std::vector<Delta> deltas = make_deltas(kGateUpForward, delta_u, delta_v, delta_rank, delta_u_start, delta_v_start,
                                          delta_pivots, delta_u_scale, delta_v_scale);
  check_moe_gate_up_forward(hidden_states, top_k_index, gate_up, deltas);
  prepare_indices(kGateUpForward, gate_up, hidden_states.size(1));
  prepare_indices(kGateUpForward, deltas);
  return combine_pairs(hidden_states, false, top_k_index, gate_up, deltas);
}

at::Tensor moe_down_forward_cpu(const at::Tensor& activated, const at::Tensor& top_k_index,
                                const at::Tensor& top_k_weights, const at::Tensor& down_base,
                                const std::optional<at::Tensor>& down_columns,
                                const std::optional<at::Tensor>& down_column_norms,
                                const at::Tensor& down_expert_to_base, int64_t down_keep,
                                const std::optional<at::Tensor>& down_bias, at::TensorList delta_u,
                                at::TensorList delta_v, at::TensorList delta_rank, at::TensorList delta_u_start,
                                at::TensorList delta_v_start, at::TensorList delta_pivots, at::TensorList delta_u_scale,
                                at::TensorList delta_v_scale, bool per_pair) {
  BaseGroup down{"down", down_base, down_columns, down_column_norms, down_expert_to_base, down_keep, down_bias};
  std::vector<Delta> deltas = make_deltas(kDownForward, delta_u, delta_v, delta_rank, delta_u_start, delta_v_start,
                                          delta_pivots, delta_u_scale, delta_v_scale);
  check_moe_down_forward(activated, top_k_index, top_k_weights, down, deltas);
  prepare_indices(kDownForward, down, activated.size(1));
  prepare_indices(kDownForward, deltas);
  if (per_pair) {
    return combine_pairs(activated, true, top_k_index, down, deltas);
  }
  const kernels::MoeRouting routing = route(top_k_index, down, false);
  const Workspace::Frame frame(workspace());
  const kernels::ElementType input_type = kernels::product_kernels(element_type(activated)).input_type;
  const at::Tensor h = activated.contiguous(), weights = top_k_weights.to(at::kFloat).contiguous();
  const float* weight = weights.const_data_ptr<float>();
  at::Tensor output = at::empty({routing.num_tokens, down.out_features()}, h.options());
  weighted_down(weighted_rows(h, routing, weight, input_type), h.size(1), routing, weight, down,
                deltas.empty() ? nullptr : &deltas.front(), output);
  return output;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(d2moe_ext, m) {
  m.def(
      "moe_forward(Tensor hidden_states, Tensor top_k_index, Tensor top_k_weights, "
      "Tensor gate_up_base, Tensor? gate_up_columns, Tensor? gate_up_column_norms, Tensor gate_up_expert_to_base, "
      "int gate_up_keep, Tensor? gate_up_bias, "
      "Tensor down_base, Tensor? down_columns, Tensor? down_column_norms, Tensor down_expert_to_base, "
      "int down_keep, Tensor? down_bias, "
      "Tensor[] delta_u, Tensor[] delta_v, Tensor[] delta_rank, Tensor[] delta_u_start, Tensor[] delta_v_start, "
      "Tensor[] delta_pivots, Tensor[] delta_u_scale, Tensor[] delta_v_scale, "
      "str activation, bool interleaved) -> Tensor");
  m.def(
      "moe_gate_up_forward(Tensor hidden_states, Tensor top_k_index, "
      "Tensor gate_up_base, Tensor? gate_up_columns, Tensor? gate_up_column_norms, Tensor gate_up_expert_to_base, "
      "int gate_up_keep, Tensor? gate_up_bias, "
      "Tensor[] delta_u, Tensor[] delta_v, Tensor[] delta_rank, Tensor[] delta_u_start, Tensor[] delta_v_start, "
      "Tensor[] delta_pivots, Tensor[] delta_u_scale, Tensor[] delta_v_scale) -> Tensor");
  m.def(
      "moe_down_forward(Tensor activated, Tensor top_k_index, Tensor top_k_weights, "
      "Tensor down_base, Tensor? down_columns, Tensor? down_column_norms, Tensor down_expert_to_base, "
      "int down_keep, Tensor? down_bias, "
      "Tensor[] delta_u, Tensor[] delta_v, Tensor[] delta_rank, Tensor[] delta_u_start, Tensor[] delta_v_start, "
      "Tensor[] delta_pivots, Tensor[] delta_u_scale, Tensor[] delta_v_scale, "
      "bool per_pair) -> Tensor");
}

TORCH_LIBRARY_IMPL(d2moe_ext, CPU, m) {
  m.impl("moe_forward", &moe_forward_cpu);
  m.impl("moe_gate_up_forward", &moe_gate_up_forward_cpu);
  m.impl("moe_down_forward", &moe_down_forward_cpu);
}

}  // namespace d2moe

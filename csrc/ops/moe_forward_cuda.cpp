// moe_forward, moe_gate_up_forward and moe_down_forward on a GPU: as moe_forward.cpp says. Index lists are not checked,
// which would take them to the host: kernels leave out what does not exist.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <string_view>

#include "kernels/moe_rows_cuda.h"
#include "ops/library_forward_cuda.h"
#include "ops/moe_forward_plan.h"
#include "ops/moe_products_cuda.h"

namespace d2moe {

namespace {

using kernels::BaseRowKind;
using kernels::BaseRows;

// sum_b base[b] (sum of weighted rows)[P] + sum U (V weighted) + weight * bias, of every token.
at::Tensor combine_tokens(PairsCall& call, const BaseGroup& down, const BaseRows& rows, const Delta* delta,
                          const at::Tensor& weighted, const at::Tensor& weights) {
  CudaSource base_source{weighted, 1};
  if (rows.kind != BaseRowKind::kPairs) {
    base_source.x = call.empty(rows.count(call.pairs), weighted.size(1));
    check_cuda(kernels::launch_base_sums(call.type, call.pairs, rows, weighted.const_data_ptr(),
                                         base_source.x.data_ptr(), weighted.size(1), call.context.stream()));
  }
  const at::Tensor base_output = base_products(call, down, rows, base_source);
  const at::Tensor delta_output = delta == nullptr ? at::Tensor() : delta_products(call, *delta, {weighted, 1});
  const at::Tensor output = call.empty(call.pairs.num_tokens, down.out_features());
  check_cuda(kernels::launch_combine_tokens(
      {call.type, call.pairs, rows, weights.const_data_ptr<float>(), base_output.const_data_ptr(),
       delta == nullptr ? nullptr : delta_output.const_data_ptr(),
       down.bias.has_value() ? down.bias->const_data_ptr() : nullptr, output.data_ptr(), down.out_features(), nullptr},
      call.context.stream()));
  return output;
}

// The products of all pairs; 0 for ids that are no expert.
at::Tensor all_pair_products(PairsCall& call, const BaseGroup& group, bool per_pair, at::ArrayRef<Delta> deltas,
                             const CudaSource& source) {
  const BaseRows rows = call.base_rows(group, per_pair);
  const at::Tensor output = call.empty(call.pairs.count(), group.out_features());
  check_cuda(kernels::launch_clear_pairs(call.type, call.pairs, rows, output.data_ptr(), group.out_features(),
                                         call.context.stream()));
  call.sort(!deltas.empty() || rows.kind != BaseRowKind::kPairs, {rows});
  pair_products(call, group, rows, deltas, source, output);
  return output;
}

at::Tensor moe_forward_cuda(const at::Tensor& hidden_states, const at::Tensor& top_k_index,
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
  const at::AutoDispatchBelowAutograd guard;
  BaseGroup gate_up{"gate_up",    gate_up_base, gate_up_columns, gate_up_column_norms, gate_up_expert_to_base,
                    gate_up_keep, gate_up_bias};
  BaseGroup down{"down", down_base, down_columns, down_column_norms, down_expert_to_base, down_keep, down_bias};
  std::vector<Delta> deltas = make_deltas(kMoeForward, delta_u, delta_v, delta_rank, delta_u_start, delta_v_start,
                                          delta_pivots, delta_u_scale, delta_v_scale);
  const kernels::Activation act = parse_activation(kMoeForward, activation);
  const ForwardPlan plan =
      check_moe_forward(hidden_states, top_k_index, top_k_weights, gate_up, down, deltas, interleaved);
  if (top_k_index.numel() == 0) {
    return at::zeros(hidden_states.sizes(), hidden_states.options());
  }
  gate_up = with_contiguous_lists(std::move(gate_up));
  down = with_contiguous_lists(std::move(down));
  deltas = with_contiguous_lists(std::move(deltas));
  const at::Tensor x = hidden_states.contiguous(), weights = top_k_weights.to(at::kFloat).contiguous();

  PairsCall call(kMoeForward, x, top_k_index, gate_up.num_experts());
  const BaseRows gate_up_rows = call.base_rows(gate_up, false), down_rows = call.base_rows(down, false);
  const at::ArrayRef<Delta> all(deltas);
  if (deltas.empty() && library_forward_serves(call, gate_up, gate_up_rows, down, down_rows)) {
    return library_forward(call, gate_up, gate_up_rows, down, down_rows, x, weights, {act, plan.gated, interleaved});
  }
  // Pairs are sorted for the deltas, or where there are none for what a base leaves to be added to each of its pairs.
  call.sort(!deltas.empty() || gate_up_rows.kind != BaseRowKind::kPairs, {gate_up_rows, down_rows});
  const at::Tensor gate_up_output = call.empty(call.pairs.count(), gate_up.out_features());
  pair_products(call, gate_up, gate_up_rows, all.slice(0, plan.num_gate_up_deltas), {x, call.pairs.top_k},
                gate_up_output);
  const at::Tensor weighted = call.empty(call.pairs.count(), plan.intermediate_size);
  check_cuda(kernels::launch_weighted_activation(
      {call.type, call.pairs, weights.const_data_ptr<float>(), gate_up_output.const_data_ptr(), weighted.data_ptr(),
       plan.intermediate_size, act, plan.gated, interleaved, deltas.empty(), gate_up_rows, nullptr, nullptr},
      call.context.stream()));
  return combine_tokens(call, down, down_rows, deltas.empty() ? nullptr : &deltas.back(), weighted, weights);
}

at::Tensor moe_gate_up_forward_cuda(const at::Tensor& hidden_states, const at::Tensor& top_k_index,
                                    const at::Tensor& gate_up_base, const std::optional<at::Tensor>& gate_up_columns,
                                    const std::optional<at::Tensor>& gate_up_column_norms,
                                    const at::Tensor& gate_up_expert_to_base, int64_t gate_up_keep,
                                    const std::optional<at::Tensor>& gate_up_bias, at::TensorList delta_u,
                                    at::TensorList delta_v, at::TensorList delta_rank, at::TensorList delta_u_start,
                                    at::TensorList delta_v_start, at::TensorList delta_pivots,
                                    at::TensorList delta_u_scale, at::TensorList delta_v_scale) {
  const at::AutoDispatchBelowAutograd guard;
  BaseGroup gate_up{"gate_up",    gate_up_base, gate_up_columns, gate_up_column_norms, gate_up_expert_to_base,
                    gate_up_keep, gate_up_bias};
  std::vector<Delta> deltas = make_deltas(kGateUpForward, delta_u, delta_v, delta_rank, delta_u_start, delta_v_start,
                                          delta_pivots, delta_u_scale, delta_v_scale);
  check_moe_gate_up_forward(hidden_states, top_k_index, gate_up, deltas);
  if (top_k_index.numel() == 0 || gate_up.out_features() == 0) {
    return at::zeros({top_k_index.numel(), gate_up.out_features()}, hidden_states.options());
  }
  gate_up = with_contiguous_lists(std::move(gate_up));
  deltas = with_contiguous_lists(std::move(deltas));
  const at::Tensor x = hidden_states.contiguous();
  PairsCall call(kGateUpForward, x, top_k_index, gate_up.num_experts());
  return all_pair_products(call, gate_up, false, deltas, {x, call.pairs.top_k});
}

at::Tensor moe_down_forward_cuda(const at::Tensor& activated, const at::Tensor& top_k_index,
                                 const at::Tensor& top_k_weights, const at::Tensor& down_base,
                                 const std::optional<at::Tensor>& down_columns,
                                 const std::optional<at::Tensor>& down_column_norms,
                                 const at::Tensor& down_expert_to_base, int64_t down_keep,
                                 const std::optional<at::Tensor>& down_bias, at::TensorList delta_u,
                                 at::TensorList delta_v, at::TensorList delta_rank, at::TensorList delta_u_start,
                                 at::TensorList delta_v_start, at::TensorList delta_pivots,
                                 at::TensorList delta_u_scale, at::TensorList delta_v_scale, bool per_pair) {
  const at::AutoDispatchBelowAutograd guard;
  BaseGroup down{"down", down_base, down_columns, down_column_norms, down_expert_to_base, down_keep, down_bias};
  std::vector<Delta> deltas = make_deltas(kDownForward, delta_u, delta_v, delta_rank, delta_u_start, delta_v_start,
                                          delta_pivots, delta_u_scale, delta_v_scale);
  check_moe_down_forward(activated, top_k_index, top_k_weights, down, deltas);
  if (top_k_index.numel() == 0 || down.out_features() == 0) {
    const int64_t num_rows = per_pair ? top_k_index.numel() : top_k_index.size(0);
    return at::zeros({num_rows, down.out_features()}, activated.options());
  }
  down = with_contiguous_lists(std::move(down));
  deltas = with_contiguous_lists(std::move(deltas));
  const at::Tensor h = activated.contiguous();
  PairsCall call(kDownForward, h, top_k_index, down.num_experts());
  if (per_pair) {
    return all_pair_products(call, down, true, deltas, {h, 1});
  }
  const BaseRows rows = call.base_rows(down, false);
  call.sort(!deltas.empty(), {rows});
  const at::Tensor weights = top_k_weights.to(at::kFloat).contiguous();
  const at::Tensor weighted = call.empty(call.pairs.count(), h.size(1));
  check_cuda(kernels::launch_weighted_rows(call.type, call.pairs, weights.const_data_ptr<float>(), h.const_data_ptr(),
                                           weighted.data_ptr(), h.size(1), call.context.stream()));
  return combine_tokens(call, down, rows, deltas.empty() ? nullptr : &deltas.front(), weighted, weights);
}

}  // namespace

TORCH_LIBRARY_IMPL(d2moe_ext, D2MOE_CUDA_KEY, m) {
  m.impl("moe_forward", &moe_forward_cuda);
  m.impl("moe_gate_up_forward", &moe_gate_up_forward_cuda);
  m.impl("moe_down_forward", &moe_down_forward_cuda);
}

}  // namespace d2moe

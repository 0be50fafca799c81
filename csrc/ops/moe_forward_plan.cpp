// The arguments of moe_forward and its halves as a whole: how they fit together.
#include "ops/moe_forward_plan.h"

#include <c10/util/Exception.h>

namespace d2moe {

namespace {

// I is the width of down's input; down's base alone does not tell it where columns are pruned.
int64_t intermediate_size_of(const BaseGroup& down, at::ArrayRef<Delta> deltas) {
  if (!deltas.empty()) {
    TORCH_CHECK(deltas.back().v.dim() == 2, kMoeForward, ": delta_v[", deltas.size() - 1,
                "] must have shape [R_v, I], got ", deltas.back().v.sizes());
    return deltas.back().v.size(1);
  }
  TORCH_CHECK(!down.columns.has_value(), kMoeForward,
              ": delta_v must hold at least down's [R_v, I], which may have 0 rows, where down_columns is given, got "
              "no tensor");
  TORCH_CHECK(down.base.dim() == 3, kMoeForward, ": down_base must have shape [K, out, kept], got ", down.base.sizes());
  return down.kept();
}

bool is_gated(const BaseGroup& gate_up, int64_t intermediate_size) {
  TORCH_CHECK(gate_up.out_features() == 2 * intermediate_size || gate_up.out_features() == intermediate_size,
              kMoeForward, ": gate_up_base must have I or 2 I rows with I = ", intermediate_size, ", got ",
              gate_up.out_features());
  return gate_up.out_features() != intermediate_size;
}

void check_delta_count(size_t count, bool gated, bool interleaved) {
  TORCH_CHECK(count == 0 || count == 2 || (count == 3 && gated), kMoeForward, ": delta_u must hold ",
              gated ? "0, 2 or 3" : "0 or 2", " tensors, got ", count);
  TORCH_CHECK(count != 3 || !interleaved, kMoeForward,
              ": delta_u must hold 2 tensors (gate_up, down) where gate_up is interleaved, got 3");
}

}  // namespace

ForwardPlan check_moe_forward(const at::Tensor& hidden_states, const at::Tensor& top_k_index,
                              const at::Tensor& top_k_weights, const BaseGroup& gate_up, const BaseGroup& down,
                              at::ArrayRef<Delta> deltas, bool interleaved) {
  check_input(kMoeForward, "hidden_states", hidden_states);
  check_routing(kMoeForward, top_k_index, hidden_states, "hidden_states");
  check_weights(kMoeForward, top_k_weights, top_k_index);
  ForwardPlan plan{};
  const int64_t hidden_size = hidden_states.size(1);
  plan.intermediate_size = intermediate_size_of(down, deltas);
  check_base_group(kMoeForward, gate_up, hidden_states, hidden_size);
  check_base_group(kMoeForward, down, hidden_states, plan.intermediate_size);
  TORCH_CHECK(down.out_features() == hidden_size, kMoeForward, ": down_base must have ", hidden_size,
              " rows like the columns of hidden_states, got ", down.out_features());
  TORCH_CHECK(down.num_experts() == gate_up.num_experts(), kMoeForward, ": down_expert_to_base must have shape [",
              gate_up.num_experts(), "] like gate_up_expert_to_base, got ", down.expert_to_base.sizes());
  plan.gated = is_gated(gate_up, plan.intermediate_size);
  check_delta_count(deltas.size(), plan.gated, interleaved);
  plan.num_gate_up_deltas = deltas.empty() ? 0 : deltas.size() - 1;
  check_deltas(kMoeForward, gate_up, deltas.slice(0, plan.num_gate_up_deltas), hidden_states, hidden_size);
  check_deltas(kMoeForward, down, deltas.slice(plan.num_gate_up_deltas), hidden_states, plan.intermediate_size);
  return plan;
}

void check_moe_gate_up_forward(const at::Tensor& hidden_states, const at::Tensor& top_k_index, const BaseGroup& gate_up,
                               at::ArrayRef<Delta> deltas) {
  TORCH_CHECK(deltas.size() <= 2, kGateUpForward, ": delta_u must hold 0, 1 or 2 tensors, got ", deltas.size());
  check_input(kGateUpForward, "hidden_states", hidden_states);
  check_routing(kGateUpForward, top_k_index, hidden_states, "hidden_states");
  check_base_group(kGateUpForward, gate_up, hidden_states, hidden_states.size(1));
  check_deltas(kGateUpForward, gate_up, deltas, hidden_states, hidden_states.size(1));
}

void check_moe_down_forward(const at::Tensor& activated, const at::Tensor& top_k_index, const at::Tensor& top_k_weights,
                            const BaseGroup& down, at::ArrayRef<Delta> deltas) {
  TORCH_CHECK(deltas.size() <= 1, kDownForward, ": delta_u must hold 0 or 1 tensors, got ", deltas.size());
  check_input(kDownForward, "activated", activated);
  check_routing(kDownForward, top_k_index, activated, "activated");
  check_weights(kDownForward, top_k_weights, top_k_index);
  check_base_group(kDownForward, down, activated, activated.size(1));
  check_deltas(kDownForward, down, deltas, activated, activated.size(1));
}

}  // namespace d2moe

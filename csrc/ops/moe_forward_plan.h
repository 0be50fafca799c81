// The arguments of moe_forward and its halves as a whole, on every device: checks that read no tensor's values.
#pragma once

#include "ops/moe_forward.h"

namespace d2moe {

constexpr const char* kMoeForward = "moe_forward";
constexpr const char* kGateUpForward = "moe_gate_up_forward";
constexpr const char* kDownForward = "moe_down_forward";

struct ForwardPlan {
  int64_t intermediate_size;
  bool gated;
  size_t num_gate_up_deltas;
};

ForwardPlan check_moe_forward(const at::Tensor& hidden_states, const at::Tensor& top_k_index,
                              const at::Tensor& top_k_weights, const BaseGroup& gate_up, const BaseGroup& down,
                              at::ArrayRef<Delta> deltas, bool interleaved);

void check_moe_gate_up_forward(const at::Tensor& hidden_states, const at::Tensor& top_k_index, const BaseGroup& gate_up,
                               at::ArrayRef<Delta> deltas);

void check_moe_down_forward(const at::Tensor& activated, const at::Tensor& top_k_index, const at::Tensor& top_k_weights,
                            const BaseGroup& down, at::ArrayRef<Delta> deltas);

}  // namespace d2moe

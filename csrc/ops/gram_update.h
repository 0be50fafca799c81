// What gram_update_ checks on every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace d2moe {

// Raises a sentence that names the argument, the rule and what was given.
void check_gram_update(const at::Tensor& gram, const at::Tensor& hidden_states,
                       const std::optional<at::Tensor>& row_weights);

}  // namespace d2moe

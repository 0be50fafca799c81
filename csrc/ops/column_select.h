// What column_select checks on every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace d2moe {

// Raises a sentence that names the argument, the rule and what was given; not what values columns have.
void check_column_select(const at::Tensor& hidden_states, const at::Tensor& column_norms, int64_t keep,
                         const std::optional<at::Tensor>& columns);

}  // namespace d2moe

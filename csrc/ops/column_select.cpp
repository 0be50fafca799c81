// Which input channels of a base are worth multiplying for the rows at hand (paper eq. 9):
//
//   scores[j] = column_norms[j] * ||hidden_states[:, columns[j]]||_2,   selected = the `keep` largest, ascending
//
//   hidden_states [T, in], column_norms [n], columns [n] (or n == in) -> scores [n] float32, selected [keep] int32
#include "ops/column_select.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstddef>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "kernels/column_select.h"
#include "ops/checks.h"
#include "ops/element_type.h"

namespace d2moe {

namespace {

constexpr const char* kOp = "column_select";
constexpr int64_t kGrain = 1 << 15;  // elements of X a thread takes at least: some ten microseconds of work

void check_column_list(const at::Tensor& columns, int64_t num_columns, const at::Tensor& hidden_states) {
  D2MOE_CHECK_SHAPE(kOp, columns, num_columns);
  D2MOE_CHECK_DTYPE(kOp, columns, at::kInt);
  D2MOE_CHECK_DEVICE(kOp, columns, hidden_states);
}

void check_columns(const at::Tensor& columns, int64_t in) {
  const at::Tensor contiguous = columns.contiguous();
  const int32_t* values = contiguous.const_data_ptr<int32_t>();
  for (int64_t j = 0; j < columns.numel(); ++j) {
    TORCH_CHECK(0 <= values[j] && values[j] < in, kOp, ": columns must lie in [0, ", in, "), got ", values[j],
                " at position ", j);
  }
}

std::tuple<at::Tensor, at::Tensor> column_select_cpu(const at::Tensor& hidden_states, const at::Tensor& column_norms,
                                                     int64_t keep, const std::optional<at::Tensor>& columns) {
  const at::AutoDispatchBelowAutograd guard;
  check_column_select(hidden_states, column_norms, keep, columns);
  if (columns.has_value()) {
    check_columns(*columns, hidden_states.size(1));
  }
  const int64_t num_tokens = hidden_states.size(0), in = hidden_states.size(1), num_columns = column_norms.size(0);
  const at::Tensor x = in > 1 && hidden_states.stride(1) == 1 ? hidden_states : hidden_states.contiguous();
  std::vector<const void*> rows(num_tokens);
  for (int64_t t = 0; t < num_tokens; ++t) {
    rows[t] = static_cast<const std::byte*>(x.const_data_ptr()) + t * x.stride(0) * x.element_size();
  }
  std::vector<double> squares(in, 0.0);
  at::parallel_for(
      0, in, std::max<int64_t>(64, kGrain / std::max<int64_t>(num_tokens, 1)), [&](int64_t begin, int64_t end) {
        kernels::accumulate_column_squares(rows.data(), element_type(x), num_tokens, begin, end, squares.data());
      });
  at::Tensor scores = at::empty({num_columns}, column_norms.options());
  at::Tensor selected = at::empty({keep}, column_norms.options().dtype(at::kInt));
  const at::Tensor norms = column_norms.contiguous();
  const at::Tensor positions = columns.has_value() ? columns->contiguous() : at::Tensor();
  kernels::score_columns(squares.data(), norms.const_data_ptr<float>(),
                         positions.defined() ? positions.const_data_ptr<int32_t>() : nullptr, num_columns,
                         scores.data_ptr<float>());
  kernels::select_columns(scores.const_data_ptr<float>(), num_columns, keep, selected.data_ptr<int32_t>());
  return {scores, selected};
}

}  // namespace

void check_column_select(const at::Tensor& hidden_states, const at::Tensor& column_norms, int64_t keep,
                         const std::optional<at::Tensor>& columns) {
  D2MOE_CHECK_DIM(kOp, hidden_states, 2);
  TORCH_CHECK(is_forward_dtype(hidden_states.scalar_type()), kOp,
              ": hidden_states must be float32, bfloat16 or float16, got ", hidden_states.scalar_type());
  D2MOE_CHECK_DIM(kOp, column_norms, 1);
  D2MOE_CHECK_DTYPE(kOp, column_norms, at::kFloat);
  D2MOE_CHECK_DEVICE(kOp, column_norms, hidden_states);
  const int64_t num_columns = column_norms.size(0);
  TORCH_CHECK(num_columns <= std::numeric_limits<int32_t>::max(), kOp,
              ": column_norms must have fewer than 2^31 elements, got ", num_columns);
  TORCH_CHECK(0 <= keep && keep <= num_columns, kOp, ": keep must be between 0 and the ", num_columns, " columns, got ",
              keep);
  if (columns.has_value()) {
    check_column_list(*columns, num_columns, hidden_states);
  } else {
    D2MOE_CHECK_SHAPE(kOp, column_norms, hidden_states.size(1));
  }
}

TORCH_LIBRARY_FRAGMENT(d2moe_ext, m) {
  m.def(
      "column_select(Tensor hidden_states, Tensor column_norms, int keep, Tensor? columns=None) "
      "-> (Tensor scores, Tensor selected)");
}

TORCH_LIBRARY_IMPL(d2moe_ext, CPU, m) { m.impl("column_select", &column_select_cpu); }

}  // namespace d2moe

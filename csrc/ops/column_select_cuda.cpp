// column_select on a GPU: nothing of it visits the host. A column that X does not have scores 0.
#include "kernels/column_select_cuda.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "ops/column_select.h"
#include "ops/cuda_context.h"
#include "ops/element_type.h"

namespace d2moe {

namespace {

at::Tensor column_squares(const at::Tensor& x, const at::TensorOptions& options, const CudaContext& context) {
  const int64_t num_rows = x.size(0), in = x.size(1);
  const int64_t parts = kernels::column_square_parts(num_rows, in, context.num_processors());
  at::Tensor squares = at::empty({in}, options.dtype(at::kDouble));
  at::Tensor partial, counters;
  if (parts > 1) {
    partial = at::empty({parts, in}, options.dtype(at::kDouble));
    counters = at::zeros({in}, options.dtype(at::kInt));
  }
  check_cuda(kernels::launch_column_squares(x.const_data_ptr(), element_type(x), num_rows, in, x.stride(0), parts,
                                            partial.defined() ? partial.data_ptr<double>() : nullptr,
                                            counters.defined() ? counters.data_ptr<int32_t>() : nullptr,
                                            squares.data_ptr<double>(), context.stream()));
  return squares;
}

std::tuple<at::Tensor, at::Tensor> column_select_cuda(const at::Tensor& hidden_states, const at::Tensor& column_norms,
                                                      int64_t keep, const std::optional<at::Tensor>& columns) {
  const at::AutoDispatchBelowAutograd guard;
  check_column_select(hidden_states, column_norms, keep, columns);
  const CudaContext context(hidden_states);
  const int64_t in = hidden_states.size(1), num_columns = column_norms.size(0);
  const at::Tensor x = in > 1 && hidden_states.stride(1) == 1 ? hidden_states : hidden_states.contiguous();
  const at::Tensor squares = column_squares(x, column_norms.options(), context);
  const at::Tensor norms = column_norms.contiguous();
  const at::Tensor positions = columns.has_value() ? columns->contiguous() : at::Tensor();
  at::Tensor scores = at::empty({num_columns}, column_norms.options());
  at::Tensor selected = at::empty({keep}, column_norms.options().dtype(at::kInt));
  check_cuda(kernels::launch_column_select(1, squares.const_data_ptr<double>(), in, norms.const_data_ptr<float>(),
                                           positions.defined() ? positions.const_data_ptr<int32_t>() : nullptr,
                                           num_columns, keep, scores.data_ptr<float>(), selected.data_ptr<int32_t>(),
                                           context.stream()));
  return {scores, selected};
}

}  // namespace

TORCH_LIBRARY_IMPL(d2moe_ext, D2MOE_CUDA_KEY, m) { m.impl("column_select", &column_select_cuda); }

}  // namespace d2moe

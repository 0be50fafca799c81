// x sorted by base  ->  gate_up  ->  weight * act(gate) * up, sorted by down's base  ->  down  ->  sums of tokens
#include "ops/library_forward_cuda.h"

#include <ATen/ops/_grouped_mm.h>

#include "kernels/moe_rows_cuda.h"
#include "kernels/tuning_cuda.h"

namespace d2moe {

using kernels::BaseRowKind;
using kernels::BaseRows;

namespace {

constexpr int64_t kMostGroups = 1023;  // torch's
constexpr int64_t kAligned = 8;        // elements of 16 bytes: what its strides must be multiples of

bool serves(const PairsCall& call, const BaseGroup& group, const BaseRows& rows) {
  const at::Tensor& base = group.base;
  const bool aligned = base.is_contiguous() && base.size(1) % kAligned == 0 && base.size(2) % kAligned == 0 &&
                       reinterpret_cast<uintptr_t>(base.const_data_ptr()) % 16 == 0;
  return rows.kind == BaseRowKind::kPairs && !group.columns.has_value() && !group.bias.has_value() && aligned &&
         group.num_bases() <= kMostGroups && call.pairs.count() >= kernels::kManyRowsEach * group.num_bases();
}

// Row i of x [P, in] times the base of its group: [P, out]. What stands after the last group is anything.
at::Tensor multiply_sorted(const at::Tensor& x, const BaseGroup& group, const SortedGroups& sorted) {
  return at::_grouped_mm(x, group.base.transpose(1, 2), sorted.offsets.slice(0, 1));
}

}  // namespace

bool library_forward_serves(const PairsCall& call, const BaseGroup& gate_up, const BaseRows& gate_up_rows,
                            const BaseGroup& down, const BaseRows& down_rows) {
  return call.context.has_grouped_mm() && call.type == kernels::ElementType::kBFloat16 &&
         call.pairs.num_tokens > kernels::kUnsortedTokens && serves(call, gate_up, gate_up_rows) &&
         serves(call, down, down_rows);
}

at::Tensor library_forward(PairsCall& call, const BaseGroup& gate_up, const BaseRows& gate_up_rows,
                           const BaseGroup& down, const BaseRows& down_rows, const at::Tensor& x,
                           const at::Tensor& weights, const LayerActivation& activation) {
  call.sort(false, {gate_up_rows, down_rows}, true);
  const SortedGroups& by_gate_up = *call.groups_of(gate_up_rows);
  const SortedGroups& by_down = *call.groups_of(down_rows);
  const cudaStream_t stream = call.context.stream();
  const int64_t num_pairs = call.pairs.count(), width = down.base.size(2);

  const at::Tensor sorted_x = call.empty(num_pairs, x.size(1));
  check_cuda(kernels::launch_gather_sorted(call.type, by_gate_up.rows, x.const_data_ptr(), call.pairs.top_k,
                                           sorted_x.data_ptr(), x.size(1), stream));
  const at::Tensor gate_up_output = multiply_sorted(sorted_x, gate_up, by_gate_up);
  const at::Tensor weighted = call.empty(num_pairs, width);
  check_cuda(kernels::launch_weighted_activation(
      {call.type, call.pairs, weights.const_data_ptr<float>(), gate_up_output.const_data_ptr(), weighted.data_ptr(),
       width, activation.activation, activation.gated, activation.interleaved, false, gate_up_rows,
       by_gate_up.rows.position, by_down.rows.position},
      stream));
  const at::Tensor down_output = multiply_sorted(weighted, down, by_down);
  const at::Tensor output = call.empty(call.pairs.num_tokens, down.out_features());
  check_cuda(kernels::launch_combine_tokens(
      {call.type, call.pairs, down_rows, weights.const_data_ptr<float>(), down_output.const_data_ptr(), nullptr,
       nullptr, output.data_ptr(), down.out_features(), by_down.rows.position},
      stream));
  return output;
}

}  // namespace d2moe

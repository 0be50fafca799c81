// The weighted half of moe_forward on the CPU:
//
//   y[t] = sum_b base[b] (sum_{e of b} g h[t, e]) + sum_e g (U[e] (V[e] h[t, e]) + bias[e])          [T, H]
//
// Down is linear, so the weighted sum is taken before the base, which is then multiplied once per (token, base). Where
// each pair is alone on its base row that saves nothing: the base then multiplies h itself, and weights come last.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <numeric>

#include "kernels/weighted_sum.h"
#include "ops/matmul.h"
#include "ops/moe_forward.h"

namespace d2moe {

namespace {

struct DownInput {
  const at::Tensor& activated;
  const int64_t* activated_row;  // of pair p; nullptr: p
  const kernels::MoeRouting& routing;
  const float* weights;

  // The rows of `activated` that hold these pairs.
  std::vector<int64_t> rows_of(const int64_t* pairs, int64_t num_pairs) const {
    std::vector<int64_t> rows(pairs, pairs + num_pairs);
    if (activated_row != nullptr) {
      for (int64_t& row : rows) {
        row = activated_row[row];
      }
    }
    return rows;
  }
};

// A run of consecutive rows is a view; anything else is gathered.
at::Tensor rows_or_view(const at::Tensor& source, const std::vector<int64_t>& rows) {
  const int64_t num_rows = static_cast<int64_t>(rows.size());
  for (int64_t i = 0; i < num_rows; ++i) {
    if (rows[i] != rows[0] + i) {
      return gather(source, rows.data(), num_rows, nullptr, source.size(1));
    }
  }
  return source.narrow(0, rows[0], num_rows);
}

// sum over the base's experts of g h, at its kept columns (those selected, if it prunes dynamically).
at::Tensor weighted_base_input(const DownInput& input, const BaseGroup& group, int64_t base, const int32_t* columns) {
  const int64_t begin = input.routing.base_row_begin[base];
  const int64_t num_rows = input.routing.base_row_begin[base + 1] - begin;
  const at::Tensor sums = at::empty({num_rows, group.kept()}, input.activated.options());
  parallel_rows(num_rows, group.kept(), [&](int64_t row_begin, int64_t row_end) {
    kernels::sum_base_inputs(input.routing, input.activated.const_data_ptr(), element_type_of(sums),
                             input.activated.stride(0), input.activated_row, input.weights, columns, group.kept(),
                             begin + row_begin, begin + row_end, begin, sums.mutable_data_ptr());
  });
  if (!group.prunes_dynamically()) {
    return sums;
  }
  std::vector<int64_t> rows(num_rows);
  std::iota(rows.begin(), rows.end(), int64_t{0});
  return gather_base_input(sums, rows.data(), num_rows, nullptr, group, base);
}

at::Tensor pair_base_input(const DownInput& input, const BaseGroup& group, int64_t base, const int32_t* columns) {
  const int64_t begin = input.routing.base_row_begin[base];
  const int64_t num_rows = input.routing.base_row_begin[base + 1] - begin;
  const std::vector<int64_t> rows = input.rows_of(input.routing.base_row_pair.data() + begin, num_rows);
  return columns == nullptr ? rows_or_view(input.activated, rows)
                            : gather(input.activated, rows.data(), num_rows, columns, group.kept());
}

at::Tensor multiply_bases(const DownInput& input, const BaseGroup& group, bool weigh_input) {
  const at::Tensor output =
      at::empty({input.routing.base_row_begin.back(), group.out_features()}, input.activated.options());
  for (int64_t base = 0; base < group.num_bases(); ++base) {
    const int64_t begin = input.routing.base_row_begin[base];
    const int64_t num_rows = input.routing.base_row_begin[base + 1] - begin;
    if (num_rows == 0) {
      continue;
    }
    const int32_t* columns =
        group.columns.has_value() ? group.columns->const_data_ptr<int32_t>() + base * group.kept() : nullptr;
    const at::Tensor x =
        weigh_input ? weighted_base_input(input, group, base, columns) : pair_base_input(input, group, base, columns);
    matmul_out(output.narrow(0, begin, num_rows), x, group.base.select(0, base).t());
  }
  return output;
}

// The deltas' outputs, only for the pairs whose expert has one: delta_row[p] is the row of pair p, or -1.
at::Tensor multiply_deltas(const DownInput& input, const Delta& delta, std::vector<int64_t>& delta_row) {
  const kernels::MoeRouting& routing = input.routing;
  int64_t num_rows = 0;
  for (int64_t i = 0; i < routing.num_experts; ++i) {
    if (delta.rank_of(routing.expert_order[i]) > 0) {
      for (int64_t position = routing.expert_begin[i]; position < routing.expert_begin[i + 1]; ++position) {
        delta_row[routing.sorted_pair[position]] = num_rows++;
      }
    }
  }
  const at::Tensor output = at::empty({num_rows, delta.u.size(1)}, input.activated.options());
  int64_t begin = 0;
  for (int64_t i = 0; i < routing.num_experts; ++i) {
    const int64_t expert = routing.expert_order[i];
    const int64_t num_pairs = routing.expert_begin[i + 1] - routing.expert_begin[i];
    if (delta.rank_of(expert) > 0 && num_pairs > 0) {
      const std::vector<int64_t> rows = input.rows_of(routing.sorted_pair.data() + routing.expert_begin[i], num_pairs);
      delta_product(output.narrow(0, begin, num_pairs), rows_or_view(input.activated, rows), delta, expert);
      begin += num_pairs;
    }
  }
  return output;
}

}  // namespace

at::Tensor weighted_down(const at::Tensor& activated, const int64_t* activated_row, const kernels::MoeRouting& routing,
                         const at::Tensor& top_k_weights, const BaseGroup& group, at::ArrayRef<Delta> deltas) {
  const at::Tensor weights = top_k_weights.to(at::kFloat).contiguous();
  const DownInput input{activated, activated_row, routing, weights.const_data_ptr<float>()};
  // Dynamic scores are taken on the weighted input, so pruning needs it even where each pair has its own row.
  const bool weigh_input = !routing.one_row_per_pair || group.prunes_dynamically();
  const at::Tensor base_output = multiply_bases(input, group, weigh_input);
  std::vector<int64_t> delta_row(routing.expert_of_pair.size(), -1);
  const at::Tensor delta_output = deltas.empty() ? at::Tensor() : multiply_deltas(input, deltas.front(), delta_row);

  kernels::ExpertOutputs outputs{};
  outputs.type = element_type_of(activated);
  outputs.width = group.out_features();
  outputs.weights = input.weights;
  outputs.base_output = base_output.const_data_ptr();
  outputs.base_is_weighted = weigh_input;
  outputs.delta_output = delta_output.defined() ? delta_output.const_data_ptr() : nullptr;
  outputs.delta_row = delta_row.data();
  outputs.bias = group.bias.has_value() ? group.bias->const_data_ptr() : nullptr;
  const at::Tensor output = at::empty({routing.num_tokens, group.out_features()}, activated.options());
  parallel_rows(routing.num_tokens, routing.top_k * group.out_features(), [&](int64_t begin, int64_t end) {
    kernels::sum_experts(routing, outputs, begin, end, output.mutable_data_ptr());
  });
  return output;
}

}  // namespace d2moe

// The products of moe_forward on the CPU: bases on their rows, deltas on their experts' rows, through ATen's GEMMs.
//
// Error: each product is accumulated in float32 and rounded once to the dtype of the forward, as an eager linear would
// (a delta twice: V x, then U (V x)); the sums of products are taken in float32 and rounded once. Factors of eight bits
// are rounded once more, when they become the dtype of the forward.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <numeric>

#include "kernels/column_select.h"
#include "kernels/dequantise_rows.h"
#include "kernels/gather_rows.h"
#include "ops/matmul.h"
#include "ops/moe_forward.h"

namespace d2moe {

namespace {

// scales[i] * rows[i]: one expert's factor, the only one of its delta that is held in the dtype of the forward.
at::Tensor dequantise(const at::Tensor& rows, const at::Tensor& scales) {
  const at::Tensor out = at::empty(rows.sizes(), scales.options());
  const kernels::ElementType type = element_type_of(scales);
  parallel_rows(rows.size(0), rows.size(1), [&](int64_t begin, int64_t end) {
    kernels::dequantise_rows(rows.const_data_ptr<int8_t>(), scales.const_data_ptr(), type, begin, end, rows.size(1),
                             out.mutable_data_ptr());
  });
  return out;
}

}  // namespace

at::Tensor Delta::u_of(int64_t expert) const {
  const int64_t start = u_start.const_data_ptr<int32_t>()[expert];
  const at::Tensor rows = u.narrow(0, start, rank_of(expert));
  return u_scale.has_value() ? dequantise(rows, u_scale->narrow(0, start, rank_of(expert))) : rows;
}

at::Tensor Delta::v_of(int64_t expert) const {
  const int64_t rank = rank_of(expert);
  const int64_t start = v_start.const_data_ptr<int32_t>()[expert];
  const int64_t columns = in_features() - rank;
  const at::Tensor rows = pivots.has_value() ? v.view({-1}).narrow(0, start, rank * columns).view({rank, columns})
                                             : v.narrow(0, start, rank);
  const int64_t scale_start = pivots.has_value() ? u_start.const_data_ptr<int32_t>()[expert] : start;
  return v_scale.has_value() ? dequantise(rows, v_scale->narrow(0, scale_start, rank)) : rows;
}

const int32_t* Delta::pivots_of(int64_t expert) const {
  return pivots->const_data_ptr<int32_t>() + u_start.const_data_ptr<int32_t>()[expert];
}

BaseGroup with_contiguous_lists(BaseGroup group) {
  const auto contiguous = [](const std::optional<at::Tensor>& tensor) {
    return tensor.has_value() ? std::optional<at::Tensor>(tensor->contiguous()) : std::nullopt;
  };
  group.columns = contiguous(group.columns);
  group.column_norms = contiguous(group.column_norms);
  group.bias = contiguous(group.bias);
  group.expert_to_base = group.expert_to_base.contiguous();
  return group;
}

std::vector<Delta> with_contiguous_lists(std::vector<Delta> deltas) {
  for (Delta& delta : deltas) {
    delta.rank = delta.rank.contiguous();
    delta.u_start = delta.u_start.contiguous();
    delta.v_start = delta.v_start.contiguous();
    if (delta.pivots.has_value()) {
      delta.pivots = delta.pivots->contiguous();
      delta.v = delta.v.contiguous();
    }
    if (delta.u_scale.has_value()) {
      delta.u = delta.u.contiguous();
      delta.v = delta.v.contiguous();
      delta.u_scale = delta.u_scale->contiguous();
      delta.v_scale = delta.v_scale->contiguous();
    }
  }
  return deltas;
}

kernels::ElementType element_type_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kBFloat16:
      return kernels::ElementType::kBFloat16;
    case at::kHalf:
      return kernels::ElementType::kFloat16;
    default:
      TORCH_INTERNAL_ASSERT(tensor.scalar_type() == at::kFloat);
      return kernels::ElementType::kFloat32;
  }
}

kernels::MoeRouting route(const at::Tensor& top_k_index, const BaseGroup& group, bool force_one_row_per_pair) {
  const at::Tensor ids = top_k_index.contiguous();
  const auto route_ids = [&](const auto* data) {
    return kernels::route_pairs(data, ids.size(0), ids.size(1), group.expert_to_base.const_data_ptr<int32_t>(),
                                group.num_experts(), group.num_bases(), force_one_row_per_pair);
  };
  return ids.scalar_type() == at::kInt ? route_ids(ids.const_data_ptr<int32_t>())
                                       : route_ids(ids.const_data_ptr<int64_t>());
}

void parallel_rows(int64_t num_rows, int64_t row_width, const std::function<void(int64_t, int64_t)>& function) {
  constexpr int64_t kElementsPerThread = 16384;
  at::parallel_for(0, num_rows, std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, row_width)), function);
}

at::Tensor gather(const at::Tensor& source, const int64_t* rows, int64_t num_rows, const int32_t* columns,
                  int64_t num_columns, const uint8_t* selected) {
  bool all_rows = num_rows == source.size(0) && columns == nullptr && selected == nullptr;
  for (int64_t i = 0; all_rows && i < num_rows; ++i) {
    all_rows = rows[i] == i;
  }
  if (all_rows) {
    return source;
  }
  const at::Tensor out = at::empty({num_rows, num_columns}, source.options());
  const kernels::ElementType type = element_type_of(source);
  parallel_rows(num_rows, num_columns, [&](int64_t begin, int64_t end) {
    kernels::gather_rows(source.const_data_ptr(), type, source.stride(0), rows, begin, end, columns, num_columns,
                         selected, out.mutable_data_ptr());
  });
  return out;
}

namespace {

// 1 for each of the `keep` kept columns that weigh most for these rows, else 0.
std::vector<uint8_t> select_columns(const at::Tensor& source, const int64_t* rows, int64_t num_rows,
                                    const int32_t* columns, const BaseGroup& group, int64_t base) {
  std::vector<double> squares(source.size(1), 0.0);
  const kernels::ElementType type = element_type_of(source);
  at::parallel_for(0, source.size(1), 1024, [&](int64_t begin, int64_t end) {
    kernels::accumulate_column_squares(source.const_data_ptr(), type, source.stride(0), rows, num_rows, begin, end,
                                       squares.data());
  });
  std::vector<float> scores(group.kept());
  const float* norms = group.column_norms->const_data_ptr<float>() + base * group.kept();
  kernels::score_columns(squares.data(), norms, columns, group.kept(), scores.data());
  std::vector<int32_t> positions(group.keep);
  kernels::select_columns(scores.data(), group.kept(), group.keep, positions.data());
  std::vector<uint8_t> selected(group.kept(), 0);
  for (const int32_t position : positions) {
    selected[position] = 1;
  }
  return selected;
}

}  // namespace

at::Tensor gather_base_input(const at::Tensor& source, const int64_t* rows, int64_t num_rows, const int32_t* columns,
                             const BaseGroup& group, int64_t base) {
  if (!group.prunes_dynamically()) {
    return gather(source, rows, num_rows, columns, group.kept());
  }
  const std::vector<uint8_t> selected = select_columns(source, rows, num_rows, columns, group, base);
  return gather(source, rows, num_rows, columns, group.kept(), selected.data());
}

namespace {

// x[:, columns]
at::Tensor gather_columns(const at::Tensor& x, const int32_t* columns, int64_t num_columns) {
  std::vector<int64_t> rows(x.size(0));
  std::iota(rows.begin(), rows.end(), int64_t{0});
  return gather(x, rows.data(), x.size(0), columns, num_columns);
}

}  // namespace

void delta_product(const at::Tensor& out, const at::Tensor& x, const Delta& delta, int64_t expert) {
  const int64_t rank = delta.rank_of(expert);
  at::Tensor projected;
  if (delta.pivots.has_value()) {
    const std::vector<int32_t> others = columns_besides_pivots(delta, expert);
    projected = gather_columns(x, delta.pivots_of(expert), rank);
    if (!others.empty()) {  // of a delta of full rank every column is a pivot
      const int64_t num_others = static_cast<int64_t>(others.size());
      matmul_add(projected, gather_columns(x, others.data(), num_others), delta.v_of(expert).t());
    }
  } else {
    projected = at::empty({x.size(0), rank}, x.options());
    matmul_out(projected, x, delta.v_of(expert).t());
  }
  matmul_out(out, projected, delta.u_of(expert));
}

namespace {

// The longest run between neighbours of `begin`: how many rows a buffer that serves one run at a time needs.
int64_t longest_run(const std::vector<int64_t>& begin) {
  int64_t longest = 0;
  for (size_t i = 1; i < begin.size(); ++i) {
    longest = std::max(longest, begin[i] - begin[i - 1]);
  }
  return longest;
}

// The deltas of one expert, each into its buffer; leaves the pointers in `rows`.
void multiply_deltas(const at::Tensor& x, at::ArrayRef<Delta> deltas, at::ArrayRef<at::Tensor> buffers, int64_t expert,
                     kernels::CombinedRows& rows) {
  for (size_t d = 0; d < deltas.size(); ++d) {
    rows.delta_widths[d] = deltas[d].u.size(1);
    rows.deltas[d] = nullptr;
    if (deltas[d].rank_of(expert) > 0) {
      const at::Tensor out = buffers[d].narrow(0, 0, x.size(0));
      delta_product(out, x, deltas[d], expert);
      rows.deltas[d] = out.const_data_ptr();
    }
  }
}

bool has_delta(at::ArrayRef<Delta> deltas, int64_t expert) {
  return std::any_of(deltas.begin(), deltas.end(), [&](const Delta& delta) { return delta.rank_of(expert) > 0; });
}

}  // namespace

void for_each_expert_product(const at::Tensor& source, bool row_per_pair, const kernels::MoeRouting& routing,
                             const BaseGroup& group, at::ArrayRef<Delta> deltas, const int64_t* output_row,
                             const FinishRows& finish) {
  const size_t num_pairs = routing.sorted_pair.size();
  std::vector<int64_t> source_rows(num_pairs), base_rows(num_pairs), output_rows(num_pairs);
  for (size_t i = 0; i < num_pairs; ++i) {
    const int64_t pair = routing.sorted_pair[i];
    source_rows[i] = row_per_pair ? pair : pair / routing.top_k;
    base_rows[i] = routing.base_row_of_pair[pair];
    output_rows[i] = output_row == nullptr ? pair : output_row[pair];
  }
  const int64_t* base_sources = (row_per_pair ? routing.base_row_pair : routing.base_row_token).data();
  const at::Tensor base_buffer =
      at::empty({longest_run(routing.base_row_begin), group.out_features()}, source.options());
  std::vector<at::Tensor> delta_buffers;
  for (const Delta& delta : deltas) {
    delta_buffers.push_back(at::empty({longest_run(routing.expert_begin), delta.u.size(1)}, source.options()));
  }

  for (int64_t base = 0; base < group.num_bases(); ++base) {
    const int64_t base_begin = routing.base_row_begin[base];
    const int64_t num_base_rows = routing.base_row_begin[base + 1] - base_begin;
    if (num_base_rows == 0) {
      continue;
    }
    const int32_t* columns =
        group.columns.has_value() ? group.columns->const_data_ptr<int32_t>() + base * group.kept() : nullptr;
    const at::Tensor base_output = base_buffer.narrow(0, 0, num_base_rows);
    matmul_out(base_output, gather_base_input(source, base_sources + base_begin, num_base_rows, columns, group, base),
               group.base.select(0, base).t());
    for (int64_t i = routing.base_expert_begin[base]; i < routing.base_expert_begin[base + 1]; ++i) {
      const int64_t begin = routing.expert_begin[i];
      const int64_t num_rows = routing.expert_begin[i + 1] - begin;
      if (num_rows == 0) {
        continue;
      }
      const int64_t expert = routing.expert_order[i];
      kernels::CombinedRows rows{};
      rows.type = element_type_of(source);
      rows.width = group.out_features();
      rows.base = base_output.const_data_ptr();
      rows.base_rows = base_rows.data() + begin;
      rows.base_row_offset = base_begin;
      rows.output_rows = output_rows.data() + begin;
      if (group.bias.has_value()) {
        rows.bias = group.bias->select(0, expert).const_data_ptr();
      }
      if (has_delta(deltas, expert)) {
        const at::Tensor x = gather(source, source_rows.data() + begin, num_rows, nullptr, source.size(1));
        multiply_deltas(x, deltas, delta_buffers, expert, rows);
      }
      finish(rows, num_rows);
    }
  }
}

}  // namespace d2moe

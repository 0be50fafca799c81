#include "ops/moe_products_cuda.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <vector>

#include "kernels/column_select_cuda.h"
#include "kernels/moe_rows_cuda.h"
#include "kernels/tuning_cuda.h"

namespace d2moe {

using kernels::BaseRowKind;
using kernels::BaseRows;
using kernels::GroupedProduct;
using kernels::WeightPart;

namespace {

template <typename Element>
const Element* pointer(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<Element>() : nullptr;
}

const void* element_at(const at::Tensor& tensor, int64_t offset) {
  return static_cast<const std::byte*>(tensor.const_data_ptr()) + offset * tensor.element_size();
}

bool by_channel(const BaseGroup& group) { return group.base.stride(2) != 1; }

// A product of rows that `call` has sorted; the caller says what it multiplies.
GroupedProduct product_of(const PairsCall& call, const BaseRows& rows, bool by_base, const CudaSource& source) {
  GroupedProduct product{};
  product.type = call.type;
  product.pairs = call.pairs;
  product.base_rows = rows;
  product.by_base = by_base;
  product.sorted = by_base ? call.by_base(rows) : call.by_expert();
  product.x = source.x.const_data_ptr();
  product.x_stride = source.x.stride(0);
  product.rows_per_x = source.rows_per_x;
  return product;
}

// Where a product goes: columns of `out` from `first` on.
void set_output(GroupedProduct& product, const at::Tensor& out, int64_t first) {
  product.out = static_cast<std::byte*>(out.data_ptr()) + first * out.element_size();
  product.out_stride = out.stride(0);
}

void run(PairsCall& call, at::ArrayRef<GroupedProduct> products) {
  const kernels::SortedRows* sorted = products.front().sorted;
  const bool many = sorted != nullptr && sorted->tile_rows != kernels::product_tile_rows(call.type, false);
  const int count = static_cast<int>(products.size());
  const kernels::ProductGrid grid = kernels::product_grid(products.data(), count, many, call.context.num_processors());
  at::Tensor partial, counters;
  if (grid.splits > 1) {
    partial = at::empty({grid.partial_floats}, call.options.dtype(at::kFloat));
    counters = call.counters(grid.counters);
  }
  check_cuda(kernels::launch_grouped_products(
      products.data(), count, grid, grid.splits > 1 ? partial.data_ptr<float>() : nullptr,
      grid.splits > 1 ? counters.data_ptr<int32_t>() : nullptr, call.context.stream()));
}

// The places, among the kept columns, of the `keep` that weigh most for the rows of each base: [num_bases, keep].
at::Tensor select_columns(PairsCall& call, const BaseGroup& group, const BaseRows& rows, const CudaSource& source) {
  const int64_t in = source.x.size(1), num_bases = group.num_bases();
  const at::TensorOptions doubles = call.options.dtype(at::kDouble), integers = call.options.dtype(at::kInt);
  kernels::BaseSquares squares{};
  squares.x = source.x.const_data_ptr();
  squares.type = call.type;
  squares.in = in;
  squares.row_stride = source.x.stride(0);
  squares.rows_per_x = source.rows_per_x;
  squares.pairs = call.pairs;
  squares.base_rows = rows;
  squares.sorted = call.by_base(rows);
  const int64_t rows_each = (rows.count(call.pairs) + num_bases - 1) / num_bases;
  squares.num_parts = kernels::column_square_parts(rows_each, in * num_bases, call.context.num_processors());
  const at::Tensor sums = at::empty({num_bases, in}, doubles);
  at::Tensor partial, counters;
  if (squares.num_parts > 1) {
    partial = at::empty({num_bases, squares.num_parts, in}, doubles);
    counters = at::zeros({num_bases, in}, integers);
    squares.partial = partial.data_ptr<double>();
    squares.counters = counters.data_ptr<int32_t>();
  }
  squares.squares = sums.data_ptr<double>();
  check_cuda(kernels::launch_base_column_squares(squares, call.context.stream()));
  const at::Tensor scores = at::empty({num_bases, group.kept()}, call.options.dtype(at::kFloat));
  at::Tensor selected = at::empty({num_bases, group.keep}, integers);
  check_cuda(kernels::launch_column_select(
      num_bases, sums.const_data_ptr<double>(), in, pointer<float>(group.column_norms), pointer<int32_t>(group.columns),
      group.kept(), group.keep, scores.data_ptr<float>(), selected.data_ptr<int32_t>(), call.context.stream()));
  return selected;
}

// What a group's bases multiply, and which of their channels.
struct BaseInput {
  CudaSource source;
  at::Tensor selected;  // [num_bases, keep] of the channels that are multiplied, in their order; undefined for all
};

BaseInput base_input(PairsCall& call, const BaseGroup& group, const BaseRows& rows, const CudaSource& source,
                     bool masks) {
  if (!group.columns.has_value() && !group.prunes_dynamically()) {
    return {source, {}};
  }
  const at::Tensor selected = group.prunes_dynamically() ? select_columns(call, group, rows, source) : at::Tensor();
  const bool masked = masks && selected.defined();
  kernels::BaseColumns columns{};
  columns.type = call.type;
  columns.pairs = call.pairs;
  columns.base_rows = rows;
  columns.x = source.x.const_data_ptr();
  columns.x_stride = source.x.stride(0);
  columns.rows_per_x = source.rows_per_x;
  columns.in_features = source.x.size(1);
  columns.columns = pointer<int32_t>(group.columns);
  columns.selected = selected.defined() ? selected.const_data_ptr<int32_t>() : nullptr;
  columns.kept = group.kept();
  columns.keep = group.prunes_dynamically() ? group.keep : group.kept();
  columns.masked = masked;
  const at::Tensor x = call.empty(rows.count(call.pairs), masked ? columns.kept : columns.keep);
  columns.out = x.data_ptr();
  columns.out_stride = x.stride(0);
  check_cuda(kernels::launch_base_columns(columns, call.context.stream()));
  return {{x, 1}, masked ? at::Tensor() : selected};
}

// One base for all tokens, by cuBLAS; a gathered copy of its channels is made of so many outputs at a time that it
// stays small.
at::Tensor library_product(PairsCall& call, const BaseGroup& group, const BaseInput& input) {
  const at::Tensor out = call.empty(call.pairs.num_tokens, group.out_features());
  const at::Tensor weights = group.base.select(0, 0).t();  // [kept, out]
  at::Tensor result = out;
  if (!input.selected.defined()) {
    at::mm_out(result, input.source.x, weights);
    return out;
  }
  const at::Tensor selected = input.selected.select(0, 0);
  const int64_t bytes_each = std::max<int64_t>(1, group.keep) * weights.element_size();
  const int64_t strip = std::max<int64_t>(1, kernels::kMostGatheredBytes / bytes_each / 128) * 128;
  for (int64_t first = 0; first < group.out_features(); first += strip) {
    const int64_t count = std::min(strip, group.out_features() - first);
    at::Tensor columns = out.narrow(1, first, count);
    at::mm_out(columns, input.source.x, at::index_select(weights.narrow(1, first, count), 0, selected));
  }
  return out;
}

kernels::ProductWeights base_weights(const BaseGroup& group, const at::Tensor& selected) {
  kernels::ProductWeights weights{};
  weights.data = group.base.const_data_ptr();
  weights.by_channel = by_channel(group);
  weights.row_stride = group.base.stride(weights.by_channel ? 2 : 1);
  weights.group_stride = group.base.stride(0);
  weights.outputs = group.out_features();
  weights.channels = selected.defined() ? group.keep : group.kept();
  weights.channel_list = selected.defined() ? selected.const_data_ptr<int32_t>() : nullptr;
  weights.stored_channels = group.kept();
  weights.part = WeightPart::kBase;
  return weights;
}

// The bases' products in `out`, with a bias if rows are pairs.
void multiply_bases(PairsCall& call, const BaseGroup& group, const BaseRows& rows, const BaseInput& input,
                    const at::Tensor& out, bool with_bias) {
  GroupedProduct product = product_of(call, rows, true, input.source);
  product.weights = base_weights(group, input.selected);
  if (with_bias && group.bias.has_value()) {
    product.finish.bias = group.bias->const_data_ptr();
    product.finish.bias_stride = group.bias->stride(0);
  }
  product.size = {group.out_features(), group.out_features(), product.weights.channels};
  set_output(product, out, 0);
  run(call, product);
}

bool uses_library(const PairsCall& call, const BaseRows& rows) {
  return rows.kind == BaseRowKind::kTokens && call.pairs.num_tokens >= kernels::kLibraryTokens;
}

BaseInput prepared_input(PairsCall& call, const BaseGroup& group, const BaseRows& rows, CudaSource source) {
  source.rows_per_x = rows.kind == BaseRowKind::kTokens ? 1 : source.rows_per_x;  // its rows are tokens, not pairs
  const bool copies = uses_library(call, rows) && call.pairs.num_tokens < kernels::kGatherTokens;
  return base_input(call, group, rows, source, copies || !by_channel(group));
}

kernels::DeltaLists delta_lists(const Delta& delta) {
  kernels::DeltaLists lists{};
  lists.rank = delta.rank.const_data_ptr<int32_t>();
  lists.u_start = delta.u_start.const_data_ptr<int32_t>();
  lists.v_start = delta.v_start.const_data_ptr<int32_t>();
  lists.in_features = delta.in_features();
  lists.pivoted = delta.pivots.has_value();
  lists.u_rows = delta.u.size(0);
  lists.v_stored = lists.pivoted ? delta.v.numel() : delta.v.size(0);
  lists.most_rank = std::min({lists.u_rows, delta.u.size(1), lists.in_features});
  return lists;
}

// Of an expert, if all have their own rows of U.
int64_t likely_rank(const PairsCall& call, const kernels::DeltaLists& lists) {
  return std::min(lists.most_rank, (lists.u_rows + call.pairs.num_experts - 1) / call.pairs.num_experts);
}

// V x of every pair, times U's scales where it has them, into inner [num_pairs, most_rank], of which each row has its
// expert's rank. A pivoted V multiplies `multiplied`, which this makes.
GroupedProduct inner_product(PairsCall& call, const Delta& delta, const CudaSource& source, CudaSource& multiplied,
                             const at::Tensor& inner) {
  const kernels::DeltaLists lists = delta_lists(delta);
  multiplied = source;
  if (lists.pivoted && lists.most_rank > 0) {
    multiplied = {call.empty(call.pairs.count(), lists.in_features), 1};
    check_cuda(kernels::launch_rest_of_pivots(
        {call.type, call.pairs, source.x.const_data_ptr(), source.x.stride(0), source.rows_per_x, lists,
         pointer<int32_t>(delta.pivots), multiplied.x.data_ptr()},
        call.context.stream()));
  }
  GroupedProduct product = product_of(call, {}, false, multiplied);
  product.weights.data = delta.v.const_data_ptr();
  product.weights.eight_bits = delta.v_scale.has_value();
  product.weights.row_stride = lists.in_features;
  product.weights.part = lists.pivoted ? WeightPart::kPivotedV : WeightPart::kV;
  product.weights.lists = lists;
  if (lists.pivoted) {
    product.finish.pivots = pointer<int32_t>(delta.pivots);
    product.finish.whole_x = source.x.const_data_ptr();
    product.finish.whole_stride = source.x.stride(0);
    product.finish.whole_rows_per_x = source.rows_per_x;
  }
  if (delta.v_scale.has_value()) {
    product.finish.v_scale = delta.v_scale->const_data_ptr();
    product.finish.u_scale = delta.u_scale->const_data_ptr();
  }
  product.size = {lists.most_rank, likely_rank(call, lists), lists.in_features};
  set_output(product, inner, 0);
  return product;
}

// What all deltas of a group give between V and U, in one launch.
std::vector<at::Tensor> inner_products(PairsCall& call, at::ArrayRef<Delta> deltas, const CudaSource& source) {
  constexpr int64_t kAligned = 8;
  std::vector<CudaSource> multiplied(deltas.size());
  std::vector<at::Tensor> inner;
  std::vector<GroupedProduct> products;
  for (const Delta& delta : deltas) {
    const int64_t most_rank = delta_lists(delta).most_rank;
    inner.push_back(call.empty(call.pairs.count(), (most_rank + kAligned - 1) / kAligned * kAligned));
    products.push_back(inner_product(call, delta, source, multiplied[products.size()], inner.back()));
  }
  run(call, products);
  return inner;
}

// U of what inner_products gave, ready for whatever is added to it.
GroupedProduct outer_product(const PairsCall& call, const BaseRows& rows, const Delta& delta, const CudaSource& inner) {
  GroupedProduct product = product_of(call, rows, false, inner);
  product.weights.data = delta.u.const_data_ptr();
  product.weights.eight_bits = delta.u_scale.has_value();
  product.weights.by_channel = true;
  product.weights.row_stride = delta.u.size(1);
  product.weights.outputs = delta.u.size(1);
  product.weights.part = WeightPart::kU;
  product.weights.lists = delta_lists(delta);
  product.size = {delta.u.size(1), delta.u.size(1), likely_rank(call, product.weights.lists)};
  return product;
}

// Adds base's output and bias, from their column `first` on, to the outputs of `product`, which `out` takes from there.
void add_base(GroupedProduct& product, const BaseGroup& group, const at::Tensor& base_output, int64_t first,
              const at::Tensor& out) {
  product.finish.base_output = element_at(base_output, first);
  product.finish.base_stride = base_output.stride(0);
  if (group.bias.has_value()) {
    product.finish.bias = element_at(*group.bias, first);
    product.finish.bias_stride = group.bias->stride(0);
  }
  set_output(product, out, first);
}

}  // namespace

at::Tensor base_products(PairsCall& call, const BaseGroup& group, const BaseRows& rows, const CudaSource& source) {
  const BaseInput input = prepared_input(call, group, rows, source);
  if (uses_library(call, rows)) {
    return library_product(call, group, input);
  }
  const at::Tensor out = call.empty(rows.count(call.pairs), group.out_features());
  multiply_bases(call, group, rows, input, out, false);
  return out;
}

void pair_products(PairsCall& call, const BaseGroup& group, const BaseRows& rows, at::ArrayRef<Delta> deltas,
                   const CudaSource& source, const at::Tensor& out) {
  if (deltas.empty() && rows.kind == BaseRowKind::kPairs) {
    multiply_bases(call, group, rows, prepared_input(call, group, rows, source), out, true);
    return;
  }
  const at::Tensor base_output = base_products(call, group, rows, source);
  if (deltas.empty()) {
    GroupedProduct nothing = product_of(call, rows, false, {base_output, 1});  // of no channels: only what is added
    nothing.weights.outputs = group.out_features();
    nothing.size = {group.out_features(), group.out_features(), 0};
    add_base(nothing, group, base_output, 0, out);
    run(call, nothing);
    return;
  }
  const std::vector<at::Tensor> inner = inner_products(call, deltas, source);
  std::vector<GroupedProduct> products;
  int64_t first = 0;
  for (const Delta& delta : deltas) {
    products.push_back(outer_product(call, rows, delta, {inner[products.size()], 1}));
    add_base(products.back(), group, base_output, first, out);
    first += delta.u.size(1);
  }
  run(call, products);
}

at::Tensor delta_products(PairsCall& call, const Delta& delta, const CudaSource& source) {
  const std::vector<at::Tensor> inner = inner_products(call, delta, source);
  const at::Tensor out = call.empty(call.pairs.count(), delta.u.size(1));
  GroupedProduct product = outer_product(call, {}, delta, {inner.front(), 1});
  set_output(product, out, 0);
  run(call, product);
  return out;
}

}  // namespace d2moe

#include "ops/base_inputs.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "kernels/column_select.h"
#include "kernels/row_conversion.h"

namespace d2moe {

using kernels::ElementType;

namespace {

constexpr int64_t kGrain = 1 << 15;  // elements a thread takes at least: some ten microseconds of work

const int32_t* columns_of(const BaseGroup& group, int64_t base) {
  return group.columns.has_value() ? group.columns->const_data_ptr<int32_t>() + base * group.kept() : nullptr;
}

// The places, among the kept columns, of the `keep` that weigh most for these rows, ascending.
const int32_t* select_columns(const BaseGroup& group, int64_t base, const void* const* rows, int64_t num_rows,
                              ElementType type, int64_t width) {
  int32_t* selected = workspace().take<int32_t>(group.keep);
  const Workspace::Frame frame(workspace());
  double* squares = workspace().take<double>(width);
  std::fill_n(squares, width, 0.0);
  at::parallel_for(0, width, std::max<int64_t>(64, kGrain / num_rows), [&](int64_t begin, int64_t end) {
    kernels::accumulate_column_squares(rows, type, num_rows, begin, end, squares);
  });
  float* scores = workspace().take<float>(group.kept());
  const float* norms = group.column_norms->const_data_ptr<float>() + base * group.kept();
  kernels::score_columns(squares, norms, columns_of(group, base), group.kept(), scores);
  kernels::select_columns(scores, group.kept(), group.keep, selected);
  return selected;
}

}  // namespace

BaseInputs::BaseInputs(const BaseGroup& group, const kernels::MoeRouting& routing, Rows source, int64_t source_width,
                       const int64_t* source_row, ElementType input_type)
    : group_(group), source_width_(source_width), input_type_(input_type) {
  const int64_t num_rows = routing.base_row_begin.back();
  const bool whole = !group.columns.has_value() && !group.prunes_dynamically();
  if (whole && source_row == nullptr) {
    rows_ = source;
    return;
  }
  const void** pointers = workspace().take<const void*>(num_rows);
  for (int64_t i = 0; i < num_rows; ++i) {
    pointers[i] = source[source_row == nullptr ? i : source_row[i]];
  }
  rows_ = {pointers};
  if (whole) {
    return;
  }
  const bool selects = group.prunes_dynamically() && base_matrix(group, 0).by_channel;
  const OwnRows own(num_rows, selects ? group.keep : group.kept(), input_type);
  selected_ = workspace().take<const int32_t*>(group.num_bases());
  for (int64_t base = 0; base < group.num_bases(); ++base) {
    selected_[base] = nullptr;
    const int64_t begin = routing.base_row_begin[base], end = routing.base_row_begin[base + 1];
    if (begin < end) {
      take_rows(base, begin, end, selects, own);
    }
  }
  rows_ = own;
}

void BaseInputs::take_rows(int64_t base, int64_t begin, int64_t end, bool selects, const OwnRows& own) {
  const int32_t* columns = columns_of(group_, base);
  int64_t count = group_.kept();
  uint8_t* keeps = nullptr;  // where the base's channels are not apart: what is not selected is multiplied as zero
  if (group_.prunes_dynamically()) {
    const int32_t* selected = select_columns(group_, base, rows_.from(begin), end - begin, input_type_, source_width_);
    if (selects) {
      int32_t* chosen = workspace().take<int32_t>(group_.keep);
      for (int64_t j = 0; j < group_.keep; ++j) {
        chosen[j] = columns == nullptr ? selected[j] : columns[selected[j]];
      }
      columns = chosen;
      count = group_.keep;
      selected_[base] = selected;
    } else {
      keeps = workspace().take<uint8_t>(count);
      std::fill_n(keeps, count, uint8_t{0});
      std::for_each(selected, selected + group_.keep, [&](int32_t j) { keeps[j] = 1; });
    }
  }
  parallel_rows(end - begin, count, [&](int64_t row_begin, int64_t row_end) {
    for (int64_t i = begin + row_begin; i < begin + row_end; ++i) {
      kernels::take_row(rows_[i], input_type_, columns, count, input_type_, own[i]);
      if (keeps != nullptr) {
        kernels::clear_row(keeps, count, input_type_, own[i]);
      }
    }
  });
}

Matrix BaseInputs::matrix(int64_t base) const {
  Matrix matrix = base_matrix(group_, base);
  if (selected_ != nullptr && selected_[base] != nullptr) {
    matrix.channels = selected_[base];
    matrix.num_inputs = group_.keep;
  }
  return matrix;
}

}  // namespace d2moe

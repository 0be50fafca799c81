#include "kernels/column_select.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace d2moe::kernels {

namespace {

template <typename Element>
void accumulate_squares(const Element* hidden_states, int64_t row_stride, const int64_t* rows, int64_t num_rows,
                        int64_t column_begin, int64_t column_end, double* squares) {
  // The column block's sums (16 KiB) stay in the first-level cache while all rows pass by.
  constexpr int64_t kColumnBlock = 2048;
  for (int64_t begin = column_begin; begin < column_end; begin += kColumnBlock) {
    const int64_t width = std::min(kColumnBlock, column_end - begin);
    double* __restrict__ sums = squares + begin;
    for (int64_t i = 0; i < num_rows; ++i) {
      const int64_t row = rows == nullptr ? i : rows[i];
      const Element* __restrict__ x = hidden_states + row * row_stride + begin;
      for (int64_t j = 0; j < width; ++j) {
        const double value = to_float(x[j]);
        sums[j] += value * value;
      }
    }
  }
}

// A key whose unsigned order is: larger score first, then lower position. Equal keys cannot occur, so the order is
// total whatever the scores are.
uint64_t descending_key(float score, int64_t position) {
  const float value = std::isnan(score) ? std::numeric_limits<float>::infinity() : score + 0.0f;  // -0 becomes +0
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t ascending = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return (static_cast<uint64_t>(~ascending) << 32) | static_cast<uint32_t>(position);
}

}  // namespace

void accumulate_column_squares(const void* hidden_states, ElementType type, int64_t row_stride, const int64_t* rows,
                               int64_t num_rows, int64_t column_begin, int64_t column_end, double* squares) {
  visit_elements(hidden_states, type, [&](const auto* elements) {
    accumulate_squares(elements, row_stride, rows, num_rows, column_begin, column_end, squares);
  });
}

void score_columns(const double* squares, const float* column_norms, const int32_t* columns, int64_t num_columns,
                   float* scores) {
  for (int64_t j = 0; j < num_columns; ++j) {
    const int64_t column = columns == nullptr ? j : columns[j];
    scores[j] = static_cast<float>(static_cast<double>(column_norms[j]) * std::sqrt(squares[column]));
  }
}

void select_columns(const float* scores, int64_t num_columns, int64_t keep, int32_t* selected) {
  if (keep == 0) {
    return;
  }
  std::vector<uint64_t> keys(num_columns);
  for (int64_t j = 0; j < num_columns; ++j) {
    keys[j] = descending_key(scores[j], j);
  }
  // Finding the last key that is kept takes linear time, and a scan for those up to it comes out in ascending order.
  std::nth_element(keys.begin(), keys.begin() + (keep - 1), keys.end());
  const uint64_t last_kept = keys[keep - 1];
  int64_t count = 0;
  for (int64_t j = 0; j < num_columns; ++j) {
    if (descending_key(scores[j], j) <= last_kept) {
      selected[count++] = static_cast<int32_t>(j);
    }
  }
}

}  // namespace d2moe::kernels

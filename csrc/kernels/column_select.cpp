#include "kernels/column_select.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/vector_clones.h"

namespace d2moe::kernels {

namespace {

D2MOE_VECTOR_CLONES void add_squares(const float* __restrict__ x, int64_t width, double* __restrict__ sums) {
  for (int64_t j = 0; j < width; ++j) {
    const double value = x[j];
    sums[j] += value * value;
  }
}

D2MOE_VECTOR_CLONES void add_squares(const double* __restrict__ x, int64_t width, double* __restrict__ sums) {
  for (int64_t j = 0; j < width; ++j) {
    sums[j] += x[j] * x[j];
  }
}

D2MOE_VECTOR_CLONES void add_squares(const BFloat16* __restrict__ x, int64_t width, double* __restrict__ sums) {
  for (int64_t j = 0; j < width; ++j) {
    const double value = to_float(x[j]);
    sums[j] += value * value;
  }
}

D2MOE_VECTOR_CLONES void add_squares(const Float16* __restrict__ x, int64_t width, double* __restrict__ sums) {
  for (int64_t j = 0; j < width; ++j) {
    const double value = to_float(x[j]);
    sums[j] += value * value;
  }
}

template <typename Element>
void accumulate_squares(const Element* const* rows, int64_t num_rows, int64_t column_begin, int64_t column_end,
                        double* squares) {
  // The column block's sums (16 KiB) stay in the first-level cache while all rows pass by.
  constexpr int64_t kColumnBlock = 2048;
  for (int64_t begin = column_begin; begin < column_end; begin += kColumnBlock) {
    const int64_t width = std::min(kColumnBlock, column_end - begin);
    for (int64_t i = 0; i < num_rows; ++i) {
      add_squares(rows[i] + begin, width, squares + begin);
    }
  }
}

// A key whose unsigned order is: larger score first.
inline uint32_t descending_key(float score) {
  const float value = std::isnan(score) ? std::numeric_limits<float>::infinity() : score + 0.0f;  // -0 becomes +0
  const uint32_t bits = bit_cast<uint32_t>(value);
  return (bits & 0x80000000u) != 0 ? bits : ~(bits | 0x80000000u);
}

// The `rank`-th smallest key (from 0), digit by digit from the top: of each digit those keys are counted that agree
// with the answer in all digits before. `rank` becomes the number of keys that are equal to it and come before.
uint32_t nth_key(const std::vector<uint32_t>& keys, int64_t& rank) {
  constexpr int kDigit = 11;
  uint32_t answer = 0, known = 0;
  for (int shift = 32 - kDigit; known != 0xffffffffu; shift = shift > kDigit ? shift - kDigit : 0) {
    int64_t counts[1 << kDigit] = {};
    for (const uint32_t key : keys) {
      counts[(key >> shift) & ((1u << kDigit) - 1)] += ((key ^ answer) & known) == 0;
    }
    uint32_t digit = 0;
    for (; rank >= counts[digit]; ++digit) {
      rank -= counts[digit];
    }
    answer |= digit << shift;
    known |= ((1u << kDigit) - 1) << shift;
  }
  return answer;
}

}  // namespace

void accumulate_column_squares(const void* const* rows, ElementType type, int64_t num_rows, int64_t column_begin,
                               int64_t column_end, double* squares) {
  visit_elements(nullptr, type, [&](const auto* elements) {
    accumulate_squares(reinterpret_cast<decltype(elements) const*>(rows), num_rows, column_begin, column_end, squares);
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
  std::vector<uint32_t> keys(num_columns);
  for (int64_t j = 0; j < num_columns; ++j) {
    keys[j] = descending_key(scores[j]);
  }
  int64_t ties = keep - 1;
  const uint32_t last_kept = nth_key(keys, ties);
  int64_t count = 0;
  for (int64_t j = 0; j < num_columns; ++j) {
    // Written first and counted after, without a branch: whether a column is kept is anyone's guess.
    selected[count] = static_cast<int32_t>(j);
    const bool tie = keys[j] == last_kept;
    count += keys[j] < last_kept || (tie && ties >= 0);
    ties -= tie;
    if (count == keep) {
      break;
    }
  }
}

}  // namespace d2moe::kernels

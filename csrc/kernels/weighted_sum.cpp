#include "kernels/weighted_sum.h"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "kernels/round_element.h"

namespace d2moe::kernels {

namespace {

template <typename Element>
void add_scaled(const Element* row, float scale, const int32_t* columns, int64_t width, float* __restrict__ sum) {
  if (columns == nullptr) {
    for (int64_t j = 0; j < width; ++j) {
      sum[j] += scale * to_float(row[j]);
    }
  } else {
    for (int64_t j = 0; j < width; ++j) {
      sum[j] += scale * to_float(row[columns[j]]);
    }
  }
}

template <typename Element>
void round_row(const std::vector<float>& sum, Element* __restrict__ output) {
  for (std::size_t j = 0; j < sum.size(); ++j) {
    output[j] = round_to<Element>(sum[j]);
  }
}

template <typename Element>
void sum_pair(const MoeRouting& routing, const ExpertOutputs& outputs, int64_t pair, float* sum) {
  const int32_t expert = routing.expert_of_pair[pair];
  const int64_t width = outputs.width;
  const float weight = outputs.weights[pair];
  const int64_t base_row = routing.base_row_of_pair[pair];
  if (routing.base_row_pair[base_row] == pair) {
    add_scaled(static_cast<const Element*>(outputs.base_output) + base_row * width,
               outputs.base_is_weighted ? 1.0f : weight, nullptr, width, sum);
  }
  if (outputs.delta_row[pair] >= 0) {
    add_scaled(static_cast<const Element*>(outputs.delta_output) + outputs.delta_row[pair] * width, weight, nullptr,
               width, sum);
  }
  if (outputs.bias != nullptr) {
    add_scaled(static_cast<const Element*>(outputs.bias) + expert * width, weight, nullptr, width, sum);
  }
}

}  // namespace

void sum_base_inputs(const MoeRouting& routing, const void* activated, ElementType type, int64_t row_stride,
                     const int64_t* activated_rows, const float* weights, const int32_t* columns, int64_t num_columns,
                     int64_t row_begin, int64_t row_end, int64_t z_row_offset, void* z) {
  visit_forward_type(type, [&](auto element) {
    using Element = decltype(element);
    std::vector<float> sum(num_columns);
    for (int64_t row = row_begin; row < row_end; ++row) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      const int64_t first = routing.base_row_pair[row];
      const int64_t end = (routing.base_row_token[row] + 1) * routing.top_k;
      for (int64_t pair = first; pair < end; ++pair) {
        if (routing.base_row_of_pair[pair] == row) {
          const int64_t source = activated_rows == nullptr ? pair : activated_rows[pair];
          add_scaled(static_cast<const Element*>(activated) + source * row_stride, weights[pair], columns, num_columns,
                     sum.data());
        }
      }
      round_row(sum, static_cast<Element*>(z) + (row - z_row_offset) * num_columns);
    }
  });
}

void sum_experts(const MoeRouting& routing, const ExpertOutputs& outputs, int64_t token_begin, int64_t token_end,
                 void* output) {
  visit_forward_type(outputs.type, [&](auto element) {
    using Element = decltype(element);
    std::vector<float> sum(outputs.width);
    for (int64_t token = token_begin; token < token_end; ++token) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int64_t pair = token * routing.top_k; pair < (token + 1) * routing.top_k; ++pair) {
        if (routing.expert_of_pair[pair] >= 0) {
          sum_pair<Element>(routing, outputs, pair, sum.data());
        }
      }
      round_row(sum, static_cast<Element*>(output) + token * outputs.width);
    }
  });
}

}  // namespace d2moe::kernels

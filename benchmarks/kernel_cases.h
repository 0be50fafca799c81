// Matrices and rows to try products with, and a plain loop to check them against.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <utility>
#include <vector>

#include "kernels/product_kernels.h"
#include "kernels/round_element.h"

namespace d2moe::kernels::cases {

inline int64_t size_of(ElementType type) { return type == ElementType::kFloat32 ? 4 : 2; }

inline const char* name_of(ElementType type) {
  return type == ElementType::kFloat32 ? "float32" : type == ElementType::kBFloat16 ? "bfloat16" : "float16";
}

// `count` random elements, between those of `padding` NaN at either end.
class Elements {
 public:
  Elements(ElementType type, int64_t count, uint32_t seed, int64_t padding = 0)
      : type_(type), padding_(padding), bytes_((count + 2 * padding) * size_of(type)) {
    std::mt19937 generator(seed);
    for (int64_t i = 0; i < count + 2 * padding; ++i) {
      const float value = static_cast<float>(generator() % 2001) / 1000.0f - 1.0f;
      set(i, i < padding || i >= count + padding ? NAN : value);
    }
  }
  const void* data() const { return bytes_.data() + padding_ * size_of(type_); }
  const void* at(int64_t i) const { return bytes_.data() + (padding_ + i) * size_of(type_); }
  double value(int64_t i) const {
    double result = 0;
    visit_elements(at(i), type_, [&](const auto* element) { result = to_float(*element); });
    return result;
  }

 private:
  void set(int64_t i, float value) {
    visit_forward_type(type_, [&](auto element) {
      reinterpret_cast<decltype(element)*>(bytes_.data())[i] = round_to<decltype(element)>(value);
    });
  }

  ElementType type_;
  int64_t padding_;
  std::vector<char> bytes_;
};

struct Case {
  int64_t num_rows, num_inputs, num_outputs;
  bool by_channel;
  bool listed;  // by channel: every third channel is left out
};

// The largest error over its bound, which is below 1 for a right product: float32 rounds each of num_inputs sums, and
// what stood in the output is kept.
inline double worst_error(const ProductKernels& kernels, ElementType type, const Case& c) {
  const int64_t stored = c.listed ? c.num_inputs * 3 / 2 + 1 : c.num_inputs;
  const int64_t stride = (c.by_channel ? c.num_outputs : c.num_inputs) + 3;
  const Elements weights(type, (c.by_channel ? stored : c.num_outputs) * stride, 1, 64);
  const int64_t x_stride = c.num_inputs + 1;
  const Elements x(kernels.input_type, c.num_rows * x_stride, 2, 64);
  std::vector<int32_t> channels(c.num_inputs);
  for (int64_t j = 0; j < c.num_inputs; ++j) {
    channels[j] = static_cast<int32_t>(c.listed ? j + j / 2 : j);
  }
  std::vector<const void*> rows(c.num_rows);
  for (int64_t m = 0; m < c.num_rows; ++m) {
    rows[m] = x.at(m * x_stride);
  }
  // All outputs, `width` of them a call.
  const auto multiply = [&](int64_t width) {
    std::vector<float> out(c.num_rows * c.num_outputs, 0.5f);
    std::vector<float*> out_rows(c.num_rows);
    for (int64_t begin = 0; begin < c.num_outputs; begin += width) {
      const int64_t end = std::min(begin + width, c.num_outputs);
      for (int64_t m = 0; m < c.num_rows; ++m) {
        out_rows[m] = out.data() + m * c.num_outputs + begin;
      }
      if (c.by_channel) {
        kernels.multiply_channels({weights.data(), stride, c.num_inputs, c.listed ? channels.data() : nullptr,
                                   rows.data(), c.num_rows, begin, end, out_rows.data()});
      } else {
        kernels.multiply_rows(
            {weights.data(), stride, c.num_inputs, rows.data(), c.num_rows, begin, end, out_rows.data()});
      }
    }
    return out;
  };
  const std::vector<float> out = multiply(c.num_outputs);
  // Which outputs a call covers must not matter to a bit.
  if (out != multiply(kOutputStep) || out != multiply(2 * kOutputStep)) {
    return INFINITY;
  }
  double worst = 0;
  for (int64_t m = 0; m < c.num_rows; ++m) {
    for (int64_t n = 0; n < c.num_outputs; ++n) {
      double exact = 0.5, size = 0.5;
      for (int64_t k = 0; k < c.num_inputs; ++k) {
        const double w = weights.value(c.by_channel ? channels[k] * stride + n : n * stride + k);
        exact += w * x.value(m * x_stride + k);
        size += std::fabs(w * x.value(m * x_stride + k));
      }
      const double bound = (static_cast<double>(c.num_inputs) + 8) * 6e-8 * size;
      const double error = std::fabs(out[m * c.num_outputs + n] - exact) / bound;
      worst = error > worst || std::isnan(error) ? (std::isnan(error) ? INFINITY : error) : worst;
    }
  }
  return worst;
}

// Every kernel of every instruction set of this CPU, at sizes around those of its tiles; false if one is wrong.
inline bool validate() {
  bool right = true;
  for (const char* const* set = instruction_sets(); *set != nullptr; ++set) {
    for (const ElementType type : {ElementType::kFloat32, ElementType::kBFloat16, ElementType::kFloat16}) {
      const ProductKernels& kernels = *product_kernels(*set, type);
      for (const int64_t num_rows : {1, 2, 3, 5, 6, 7, 8, 9, 11, 12, 13, 25, 49, 60}) {
        for (const auto& [inputs, outputs] :
             {std::pair<int64_t, int64_t>{1, 1}, {7, 40}, {33, 5}, {64, 64}, {259, 99}, {2055, 35}, {3, 300}}) {
          for (const int form : {0, 1, 2}) {
            const Case c{num_rows, inputs, outputs, form > 0, form == 2};
            const double error = worst_error(kernels, type, c);
            if (!(error < 1)) {
              std::fprintf(stderr, "%s, %s, %s: %ld rows, %ld inputs, %ld outputs: error %.3g of its bound\n", *set,
                           name_of(type),
                           form == 0   ? "by row"
                           : form == 1 ? "by channel"
                                       : "by listed channel",
                           static_cast<long>(num_rows), static_cast<long>(inputs), static_cast<long>(outputs), error);
              right = false;
            }
          }
        }
      }
    }
  }
  return right;
}

}  // namespace d2moe::kernels::cases

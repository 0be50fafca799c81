#include "kernels/gated_activation.h"

#include <cmath>
#include <vector>

#include "kernels/round_element.h"

namespace d2moe::kernels {

namespace {

// exp(x) to 2 units in the last place for -87 <= x <= 88.3, infinity above, exp(-87) below, NaN for NaN: Cody-Waite
// reduction and a polynomial, in a form that vectorises, which std::exp does not.
inline float fast_exp(float x) {
  x = x > 89.0f ? 89.0f : x;  // rounds to 2^128 below: infinity
  x = x < -87.0f ? -87.0f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  return p * bit_cast<float>((bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

struct Silu {
  float operator()(float x) const { return x * sigmoid(x); }
};

struct Gelu {
  float operator()(float x) const { return 0.5f * x * std::erfc(x * -0.707106781f); }
};

struct GeluTanh {
  // 0.5 * (1 + tanh(u)) == sigmoid(2 u), u = sqrt(2 / pi) * (x + 0.044715 x^3)
  float operator()(float x) const { return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x)); }
};

struct Relu2 {
  float operator()(float x) const { return x <= 0.0f ? 0.0f : x * x; }  // NaN stays NaN
};

template <typename Element>
void add_row(const Element* row, int64_t width, float* __restrict__ sum) {
  for (int64_t j = 0; j < width; ++j) {
    sum[j] += to_float(row[j]);
  }
}

template <typename Element>
void combine_row(const CombinedRows& rows, int64_t i, float* __restrict__ sum) {
  const Element* base =
      static_cast<const Element*>(rows.base) + (rows.base_rows[i] - rows.base_row_offset) * rows.width;
  for (int64_t j = 0; j < rows.width; ++j) {
    sum[j] = to_float(base[j]);
  }
  int64_t column = 0;
  for (int delta = 0; delta < 2; ++delta) {
    const int64_t width = rows.delta_widths[delta];
    if (rows.deltas[delta] != nullptr) {
      add_row(static_cast<const Element*>(rows.deltas[delta]) + i * width, width, sum + column);
    }
    column += width;
  }
  if (rows.bias != nullptr) {
    add_row(static_cast<const Element*>(rows.bias), rows.width, sum);
  }
}

template <typename Element, typename Act>
void activate_row(const float* __restrict__ row, Act act, bool gated, bool interleaved, int64_t width,
                  Element* __restrict__ output) {
  const int64_t half = width / 2;
  if (!gated) {
    for (int64_t j = 0; j < width; ++j) {
      output[j] = round_to<Element>(act(row[j]));
    }
  } else if (interleaved) {
    for (int64_t j = 0; j < half; ++j) {
      output[j] = round_to<Element>(act(row[2 * j]) * row[2 * j + 1]);
    }
  } else {
    for (int64_t j = 0; j < half; ++j) {
      output[j] = round_to<Element>(act(row[j]) * row[half + j]);
    }
  }
}

template <typename Act>
void activate_rows(const CombinedRows& rows, Act act, bool gated, bool interleaved, int64_t row_begin, int64_t row_end,
                   void* output) {
  visit_forward_type(rows.type, [&](auto element) {
    using Element = decltype(element);
    const int64_t output_width = gated ? rows.width / 2 : rows.width;
    std::vector<float> row(rows.width);
    for (int64_t i = row_begin; i < row_end; ++i) {
      combine_row<Element>(rows, i, row.data());
      activate_row(row.data(), act, gated, interleaved, rows.width,
                   static_cast<Element*>(output) + rows.output_rows[i] * output_width);
    }
  });
}

}  // namespace

void combine_rows(const CombinedRows& rows, int64_t row_begin, int64_t row_end, void* output) {
  visit_forward_type(rows.type, [&](auto element) {
    using Element = decltype(element);
    std::vector<float> row(rows.width);
    for (int64_t i = row_begin; i < row_end; ++i) {
      combine_row<Element>(rows, i, row.data());
      Element* out = static_cast<Element*>(output) + rows.output_rows[i] * rows.width;
      for (int64_t j = 0; j < rows.width; ++j) {
        out[j] = round_to<Element>(row[j]);
      }
    }
  });
}

void gated_activation(const CombinedRows& rows, Activation activation, bool gated, bool interleaved, int64_t row_begin,
                      int64_t row_end, void* output) {
  switch (activation) {
    case Activation::kSilu:
      return activate_rows(rows, Silu(), gated, interleaved, row_begin, row_end, output);
    case Activation::kGelu:
      return activate_rows(rows, Gelu(), gated, interleaved, row_begin, row_end, output);
    case Activation::kGeluTanh:
      return activate_rows(rows, GeluTanh(), gated, interleaved, row_begin, row_end, output);
    case Activation::kRelu2:
      return activate_rows(rows, Relu2(), gated, interleaved, row_begin, row_end, output);
  }
}

}  // namespace d2moe::kernels

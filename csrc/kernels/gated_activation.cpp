#include "kernels/gated_activation.h"

#include <cmath>

#include "kernels/element_type.h"
#include "kernels/vector_clones.h"

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

// One function for each activation and layout, so that each is compiled for every instruction set.
#define D2MOE_DEFINE_ACTIVATION(name, Act)                                                                        \
  D2MOE_VECTOR_CLONES void name##_of_halves(int64_t count, float scale, float* __restrict__ gate,                 \
                                            const float* __restrict__ up) {                                       \
    for (int64_t j = 0; j < count; ++j) {                                                                         \
      gate[j] = scale * (Act()(gate[j]) * up[j]);                                                                 \
    }                                                                                                             \
  }                                                                                                               \
  D2MOE_VECTOR_CLONES void name##_of_pairs(int64_t count, float scale, float* values) {                           \
    for (int64_t j = 0; j < count; ++j) {                                                                         \
      values[j] = scale * (Act()(values[2 * j]) * values[2 * j + 1]);                                             \
    }                                                                                                             \
  }                                                                                                               \
  D2MOE_VECTOR_CLONES void name##_alone(int64_t count, float scale, float* values) {                              \
    for (int64_t j = 0; j < count; ++j) {                                                                         \
      values[j] = scale * Act()(values[j]);                                                                       \
    }                                                                                                             \
  }                                                                                                               \
  void name##_gated(int64_t count, bool interleaved, float scale, float* values) {                                \
    interleaved ? name##_of_pairs(count, scale, values) : name##_of_halves(count, scale, values, values + count); \
  }

D2MOE_DEFINE_ACTIVATION(silu, Silu)
D2MOE_DEFINE_ACTIVATION(gelu, Gelu)
D2MOE_DEFINE_ACTIVATION(gelu_tanh, GeluTanh)
D2MOE_DEFINE_ACTIVATION(relu2, Relu2)

#undef D2MOE_DEFINE_ACTIVATION

}  // namespace

void gated_activation(Activation activation, int64_t count, bool interleaved, float scale, float* values) {
  switch (activation) {
    case Activation::kSilu:
      return silu_gated(count, interleaved, scale, values);
    case Activation::kGelu:
      return gelu_gated(count, interleaved, scale, values);
    case Activation::kGeluTanh:
      return gelu_tanh_gated(count, interleaved, scale, values);
    case Activation::kRelu2:
      return relu2_gated(count, interleaved, scale, values);
  }
}

void activation(Activation activation, int64_t count, float scale, float* values) {
  switch (activation) {
    case Activation::kSilu:
      return silu_alone(count, scale, values);
    case Activation::kGelu:
      return gelu_alone(count, scale, values);
    case Activation::kGeluTanh:
      return gelu_tanh_alone(count, scale, values);
    case Activation::kRelu2:
      return relu2_alone(count, scale, values);
  }
}

}  // namespace d2moe::kernels

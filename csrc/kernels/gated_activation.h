// In place, in float32: values[j] = scale * act(gate[j]) * up[j], or scale * act(values[j]) where there is no gate.
#pragma once

#include <cstdint>

namespace d2moe::kernels {

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu2 };

// values [2 * count] hold gate, then up; or they alternate, if `interleaved`. The first `count` of them are written.
void gated_activation(Activation activation, int64_t count, bool interleaved, float scale, float* values);

// values [count]
void activation(Activation activation, int64_t count, float scale, float* values);

}  // namespace d2moe::kernels

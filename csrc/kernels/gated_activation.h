// values[j] = scale * act(gate[j]) * up[j], or scale * act(values[j]) where there is no gate, all in float32.
#pragma once

#include <cstdint>

namespace d2moe::kernels {

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu2 };

// gate and up stand one after the other, [count] each, or alternate if `interleaved`; values [count] may be gate's
// place.
void gated_activation(Activation activation, const float* gate_up, int64_t count, bool interleaved, float scale,
                      float* values);

// values [count], in place.
void activation(Activation activation, int64_t count, float scale, float* values);

}  // namespace d2moe::kernels

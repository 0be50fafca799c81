// From float32 to the dtype of the forward, rounding to nearest even: the other direction of element_type.h, and as
// branch-free, so that the loops that call it vectorise.
#pragma once

#include <cstdint>

#include "kernels/element_type.h"

namespace d2moe::kernels {

template <typename Element>
Element round_to(float value);

template <>
inline float round_to<float>(float value) {
  return value;
}

template <>
inline BFloat16 round_to<BFloat16>(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>(value != value ? 0x7fc0 : rounded)};
}

template <>
inline Float16 round_to<Float16>(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  // Normal results: round to the 10 bits of mantissa that stay, then move the exponent's bias from 127 to 15.
  const uint32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - ((127u - 15) << 23)) >> 13;
  // Subnormal results (below 2^-14): adding 0.5 leaves exactly the multiples of 2^-24 in a float32's mantissa.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  // 65520 and above round to infinity.
  const uint32_t finite = magnitude < 0x38800000 ? subnormal : (magnitude >= 0x477ff000 ? 0x7c00 : normal);
  return {static_cast<uint16_t>(sign | (value != value ? 0x7e00 : finite))};
}

// Calls function(Element()) with the type of the forward that `type` names; float64 is none.
template <typename Function>
void visit_forward_type(ElementType type, Function&& function) {
  switch (type) {
    case ElementType::kFloat32:
      return function(float());
    case ElementType::kBFloat16:
      return function(BFloat16());
    case ElementType::kFloat16:
      return function(Float16());
    case ElementType::kFloat64:
      return;
  }
}

}  // namespace d2moe::kernels

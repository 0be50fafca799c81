// Floating-point elements as the kernels see them: raw storage and its conversion to float, with no torch header.
// The conversions are branch-free selects, so that the compiler can vectorise the loops that call them.
#pragma once

#include <cstdint>
#include <cstring>

namespace d2moe::kernels {

// std::bit_cast, which C++17 (the standard of torch before 2.13) lacks.
template <typename To, typename From>
inline To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

enum class ElementType { kFloat32, kFloat64, kBFloat16, kFloat16 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline double to_float(double value) { return value; }

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) { return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

inline float to_float(Float16 value) {
  constexpr uint32_t kRebias = (127 - 15) << 23;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  const uint32_t exponent = magnitude & 0x0f800000;
  // A subnormal is read as 2^-14 * (1 + mantissa), from which 2^-14 is taken: no float32 subnormal arises on the
  // way, so the result does not depend on the flush-to-zero mode.
  constexpr float kSmallestNormal = 6.103515625e-05f;
  const float subnormal = bit_cast<float>(magnitude + kRebias + (1u << 23)) - kSmallestNormal;
  const uint32_t special = exponent == 0x0f800000 ? kRebias : 0;  // infinity and NaN: exponent 255
  const uint32_t normal = magnitude + kRebias + special;
  return bit_cast<float>((exponent == 0 ? bit_cast<uint32_t>(subnormal) : normal) | sign);
}

// Calls function(pointer) with `data` as a pointer to its true element type; a GPU has types of its own for 16 bits.
template <typename BFloat16Type = BFloat16, typename Float16Type = Float16, typename Function>
void visit_elements(const void* data, ElementType type, Function&& function) {
  switch (type) {
    case ElementType::kFloat32:
      return function(static_cast<const float*>(data));
    case ElementType::kFloat64:
      return function(static_cast<const double*>(data));
    case ElementType::kBFloat16:
      return function(static_cast<const BFloat16Type*>(data));
    case ElementType::kFloat16:
      return function(static_cast<const Float16Type*>(data));
  }
}

}  // namespace d2moe::kernels

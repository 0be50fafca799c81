// CUDA's bfloat16 for the emulation.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) { return __int_as_float(static_cast<int>(value.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (std::isnan(value)) {
    return {0x7fff};
  }
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // to nearest, ties to even
}

// CUDA's float16 for the emulation.
#pragma once

#include <c10/util/Half.h>

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) { return c10::Half(value.bits, c10::Half::from_bits()); }
inline __half __float2half(float value) { return {c10::Half(value).x}; }

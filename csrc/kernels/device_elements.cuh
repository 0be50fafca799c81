// Floating-point elements on the GPU: conversions, and several of them in one load.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "kernels/element_type.h"

namespace d2moe::kernels {

__device__ inline double widen(double value) { return value; }
__device__ inline float widen(float value) { return value; }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widen(__half value) { return __half2float(value); }

// Rounded to nearest, ties to even.
template <typename Element>
__device__ inline Element narrow(float value) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    return __float2bfloat16(value);
  } else if constexpr (std::is_same_v<Element, __half>) {
    return __float2half(value);
  } else {
    return value;
  }
}

// kCount elements that are loaded and stored 16 bytes at a time; the address must be a multiple of 16 bytes, or of all
// of them where they are fewer.
template <typename Element, int kCount>
struct alignas(sizeof(Element) * kCount < 16 ? sizeof(Element) * kCount : 16) Pack {
  Element values[kCount];
};

// visit_elements with the GPU's types.
template <typename Function>
void visit_device_elements(const void* data, ElementType type, Function&& function) {
  visit_elements<__nv_bfloat16, __half>(data, type, function);
}

// How many blocks of kThreads cover `items` without more than a few waves; kernels stride over the grid.
inline unsigned int grid_size(int64_t items, int threads) {
  constexpr int64_t kMost = 1 << 16;
  const int64_t blocks = (items + threads - 1) / threads;
  return static_cast<unsigned int>(blocks < 1 ? 1 : blocks < kMost ? blocks : kMost);
}

}  // namespace d2moe::kernels

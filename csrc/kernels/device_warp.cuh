// The lanes of a warp.
#pragma once

#include <cuda_runtime.h>

namespace d2moe::kernels {

constexpr int kLanes = 32;
constexpr unsigned int kAllLanes = 0xffffffffu;

// Sum of the values of lower lanes.
__device__ inline int lanes_below(int value) {
  int total = value;
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, total, step);
    total += static_cast<int>(threadIdx.x % kLanes) >= step ? other : 0;
  }
  return total - value;
}

}  // namespace d2moe::kernels

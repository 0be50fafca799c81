// Starting a kernel: the one place that differs where tests run kernels on a CPU (tools/emulated_cuda).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace d2moe::kernels {

// Shared memory that the launch sizes, at a multiple of 16 bytes.
__device__ inline unsigned char* dynamic_shared() {
#ifdef D2MOE_EMULATED
  return emulated_cuda::dynamic_shared();
#else
  extern __shared__ __align__(16) unsigned char d2moe_dynamic_shared[];
  return d2moe_dynamic_shared;
#endif
}

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...); an empty grid is not launched.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) {
    return cudaSuccess;
  }
#ifdef D2MOE_EMULATED
  emulated_cuda::run_grid(grid, block, shared_bytes, [=] { kernel(arguments...); });
  return cudaSuccess;
#else
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (status != cudaSuccess) {
      return status;
    }
  }
  // clang-format off: it takes the brackets for shifts
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  // clang-format on
  return cudaGetLastError();
#endif
}

}  // namespace d2moe::kernels

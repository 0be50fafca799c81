// torch's cuBLAS handle for the current device and stream.
#pragma once

#ifdef D2MOE_EMULATED
#include <cublas_v2.h>
#else
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/Exceptions.h>
#endif

#include "ops/cuda_context.h"

namespace d2moe {

inline void check_blas(cublasStatus_t status) {
#ifdef D2MOE_EMULATED
  TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "cuBLAS must be called as its manual says, got status ",
              static_cast<int>(status));
#else
  TORCH_CUDABLAS_CHECK(status);
#endif
}

inline cublasHandle_t blas_handle() {
#ifdef D2MOE_EMULATED
  static cublasHandle_t handle = nullptr;
  if (handle == nullptr) {
    check_blas(cublasCreate(&handle));
  }
  return handle;
#else
  return at::cuda::getCurrentCUDABlasHandle();
#endif
}

}  // namespace d2moe

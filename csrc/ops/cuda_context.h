// What an operator needs to know of the GPU that its tensors are on. Where tests run kernels on a CPU
// (tools/emulated_cuda) the same operators are registered for that.
#pragma once

#include <ATen/core/Tensor.h>

#ifdef D2MOE_EMULATED
#include <c10/util/Exception.h>
#include <cuda_runtime.h>

#define D2MOE_CUDA_KEY CPU
#else
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#define D2MOE_CUDA_KEY CUDA
#endif

namespace d2moe {

// The device of a tensor is the current one while this lives.
class CudaContext {
 public:
#ifdef D2MOE_EMULATED
  explicit CudaContext(const at::Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
  int num_processors() const { return 32; }
  bool has_grouped_mm() const { return true; }
#else
  explicit CudaContext(const at::Tensor& tensor) : guard_(tensor.device()) {}
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream(); }
  int num_processors() const { return at::cuda::getCurrentDeviceProperties()->multiProcessorCount; }
  // Whether torch multiplies groups in bfloat16 without asking the host for their sizes; elsewhere it is a loop that
  // does.
  bool has_grouped_mm() const {
    const int major = at::cuda::getCurrentDeviceProperties()->major;
    return major == 9 || major == 10;
  }

 private:
  const c10::cuda::CUDAGuard guard_;
#endif
};

inline void check_cuda(cudaError_t status) {
#ifdef D2MOE_EMULATED
  TORCH_CHECK(status == cudaSuccess, "a kernel must be launched, got status ", static_cast<int>(status));
#else
  C10_CUDA_CHECK(status);
#endif
}

}  // namespace d2moe

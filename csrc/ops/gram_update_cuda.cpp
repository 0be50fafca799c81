// gram_update_ on a GPU: cuBLAS multiplies X as it is into float32, strip by strip of the lower triangle, which a
// kernel then mirrors. Never in TF32, whatever torch allows: a Gram matrix is factorised afterwards.
#include "kernels/gram_update_cuda.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <algorithm>

#include "ops/cuda_blas.h"
#include "ops/cuda_context.h"
#include "ops/element_type.h"
#include "ops/gram_update.h"

namespace d2moe {

namespace {

// Width of a strip of the triangle: products of [T, 1024] fill a large GPU. Not tuned.
constexpr int64_t kStrip = 1024;
constexpr int64_t kMostTokens = 1 << 20;     // in one product
constexpr int64_t kChunkElements = 1 << 26;  // of X converted to the Gram's dtype at a time: 256 MB in float32

// torch's handle, for as long as this lives, without TF32 and with all sums in float32.
class ExactHandle {
 public:
  ExactHandle() : handle_(blas_handle()) {
    check_blas(cublasGetMathMode(handle_, &before_));
    const int exact = static_cast<int>(CUBLAS_DEFAULT_MATH) | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    check_blas(cublasSetMathMode(handle_, static_cast<cublasMath_t>(exact)));
  }
  ~ExactHandle() { cublasSetMathMode(handle_, before_); }
  ExactHandle(const ExactHandle&) = delete;
  ExactHandle& operator=(const ExactHandle&) = delete;
  operator cublasHandle_t() const { return handle_; }

 private:
  cublasHandle_t handle_;
  cublasMath_t before_{};
};

cudaDataType_t data_type(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return CUDA_R_64F;
    case at::kBFloat16:
      return CUDA_R_16BF;
    case at::kHalf:
      return CUDA_R_16F;
    default:
      return CUDA_R_32F;
  }
}

// gram[begin : end, 0 : end] += left[:, begin : end]^T right[:, 0 : end]. cuBLAS counts columns first, so that it sees
// every matrix transposed.
void add_strip(cublasHandle_t handle, const at::Tensor& gram, const at::Tensor& left, const at::Tensor& right,
               int64_t begin, int64_t end) {
  const bool wide = gram.scalar_type() == at::kDouble;
  const double one = 1.0;
  const float one_float = 1.0f;
  const void* scale = wide ? static_cast<const void*>(&one) : &one_float;
  const auto* first = static_cast<const std::byte*>(left.const_data_ptr()) + begin * left.element_size();
  auto* out = static_cast<std::byte*>(gram.data_ptr()) + begin * gram.size(1) * gram.element_size();
  check_blas(cublasGemmEx(handle, CUBLAS_OP_N, CUBLAS_OP_T, static_cast<int>(end), static_cast<int>(end - begin),
                          static_cast<int>(left.size(0)), scale, right.const_data_ptr(), data_type(right),
                          static_cast<int>(right.stride(0)), first, data_type(left), static_cast<int>(left.stride(0)),
                          scale, out, data_type(gram), static_cast<int>(gram.size(1)),
                          wide ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

void add_rows(const at::Tensor& gram, const at::Tensor& x, const at::Tensor& weighted) {
  const ExactHandle handle;
  const int64_t n = gram.size(0);
  for (int64_t begin = 0; begin < n; begin += kStrip) {
    add_strip(handle, gram, weighted, x, begin, std::min(begin + kStrip, n));
  }
}

// cuBLAS multiplies bfloat16 and float16 into float32 without converting them first; weights would be lost in 16 bits.
bool as_they_are(const at::Tensor& gram, const at::Tensor& x, bool has_weights) {
  const bool sixteen_bits = x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf;
  return !has_weights && (x.scalar_type() == gram.scalar_type() || (gram.scalar_type() == at::kFloat && sixteen_bits));
}

void gram_update_cuda(at::Tensor& gram, const at::Tensor& hidden_states, const std::optional<at::Tensor>& row_weights) {
  const at::AutoDispatchBelowAutograd guard;
  check_gram_update(gram, hidden_states, row_weights);
  const int64_t num_tokens = hidden_states.size(0), n = hidden_states.size(1);
  if (num_tokens == 0 || n == 0) {
    return;
  }
  const CudaContext context(gram);
  const at::Tensor target = gram.contiguous();
  const bool direct = as_they_are(gram, hidden_states, row_weights.has_value());
  const int64_t chunk = direct ? kMostTokens : std::clamp<int64_t>(kChunkElements / n, 1, kMostTokens);
  for (int64_t first = 0; first < num_tokens; first += chunk) {
    const int64_t last = std::min(first + chunk, num_tokens);
    const at::Tensor rows = hidden_states.slice(0, first, last);
    const at::Tensor x = (direct ? rows : rows.to(gram.scalar_type())).contiguous();
    const at::Tensor weighted =
        row_weights.has_value() ? x * row_weights->slice(0, first, last).to(gram.scalar_type()).unsqueeze(1) : x;
    add_rows(target, x, weighted);
  }
  check_cuda(kernels::launch_mirror_lower_triangle(target.data_ptr(), element_type(target), n, context.stream()));
  if (!target.is_same(gram)) {
    gram.copy_(target);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(d2moe_ext, D2MOE_CUDA_KEY, m) { m.impl("gram_update_", &gram_update_cuda); }

}  // namespace d2moe

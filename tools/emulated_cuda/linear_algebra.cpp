// cublas_v2.h and cusolverDn.h, element for element as the libraries have them: columns first, one triangle read, and
// whatever their manuals call scratch (the other triangle, a matrix without a factor, eigenvectors that nobody asked
// for, workspaces) filled with NaN. A size, a type or a workspace that does not fit is refused.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones_like.h>

#include <cstring>
#include <limits>
#include <tuple>

#include "cusolverDn.h"

struct EmulatedBlas {
  cublasMath_t mode = CUBLAS_DEFAULT_MATH;
};
struct EmulatedSolver {};
struct EmulatedSolverParams {};

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

at::Tensor matrix(const void* data, int64_t rows, int64_t columns, int64_t leading, at::ScalarType type = at::kDouble) {
  return at::from_blob(const_cast<void*>(data), {rows, columns}, {1, leading}, type);
}

at::ScalarType scalar_type(cudaDataType type) {
  switch (type) {
    case CUDA_R_16F:
      return at::kHalf;
    case CUDA_R_16BF:
      return at::kBFloat16;
    case CUDA_R_32F:
      return at::kFloat;
    default:
      return at::kDouble;
  }
}

// From the triangle that is read.
at::Tensor symmetric(const at::Tensor& stored, cublasFillMode_t uplo) {
  return uplo == CUBLAS_FILL_MODE_UPPER ? stored.triu() + stored.triu(1).mT() : stored.tril() + stored.tril(-1).mT();
}

void factor(const at::Tensor& stored, cublasFillMode_t uplo, int* info) {
  const auto [lower, failed] = at::linalg_cholesky_ex(symmetric(stored, uplo));
  *info = failed.item<int>();
  const at::Tensor found = uplo == CUBLAS_FILL_MODE_UPPER ? lower.mT() : lower;
  const at::Tensor kept = at::ones_like(found, at::kBool);
  stored.copy_(found);
  stored.masked_fill_((uplo == CUBLAS_FILL_MODE_UPPER ? kept.triu() : kept.tril()).logical_not(), kNan);
  if (*info != 0) {
    stored.fill_(kNan);
  }
}

void eigen(const at::Tensor& stored, cublasFillMode_t uplo, bool vectors, double* values, int* info) {
  const auto [found_values, found_vectors] = at::linalg_eigh(symmetric(stored, uplo));
  at::from_blob(values, {stored.size(0)}, at::kDouble).copy_(found_values);
  if (vectors) {
    stored.copy_(found_vectors);
  } else {
    stored.fill_(kNan);
  }
  *info = 0;
}

size_t device_bytes(int64_t n, int64_t count) { return static_cast<size_t>(40 * n * count + 8); }

constexpr size_t kHostBytes = 24;

bool spoil(void* device, size_t size, size_t device_needed, void* host, size_t host_size) {
  if (size < device_needed || host_size < kHostBytes || device == nullptr || host == nullptr) {
    return false;
  }
  std::memset(device, 0xff, size);
  std::memset(host, 0xff, host_size);
  return true;
}

bool fits(const void* handle, int64_t n, int64_t leading, cudaDataType type) {
  return handle != nullptr && n >= 1 && leading >= n && type == CUDA_R_64F;
}

}  // namespace

cublasStatus_t cublasCreate(cublasHandle_t* handle) {
  *handle = new EmulatedBlas;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetStream(cublasHandle_t handle, cudaStream_t) {
  return handle == nullptr ? CUBLAS_STATUS_INVALID_VALUE : CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t* mode) {
  *mode = handle->mode;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) {
  handle->mode = mode;
  return CUBLAS_STATUS_SUCCESS;
}

// Float64, or float32 sums of what A and B hold; both of one type, which is C's, or of 16 bits into float32.
cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int m, int n,
                            int k, const void* alpha, const void* A, cudaDataType Atype, int lda, const void* B,
                            cudaDataType Btype, int ldb, const void* beta, void* C, cudaDataType Ctype, int ldc,
                            cublasComputeType_t computeType, cublasGemmAlgo_t) {
  const bool wide = computeType == CUBLAS_COMPUTE_64F, plain_a = transa == CUBLAS_OP_N, plain_b = transb == CUBLAS_OP_N;
  const bool types = Atype == Btype && (wide ? Atype == CUDA_R_64F && Ctype == CUDA_R_64F
                                             : Atype != CUDA_R_64F && (Ctype == Atype || Ctype == CUDA_R_32F));
  if (handle == nullptr || !types || m < 0 || n < 0 || k < 0 || lda < (plain_a ? m : k) || ldb < (plain_b ? k : n) ||
      ldc < m) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  const at::ScalarType compute = wide ? at::kDouble : at::kFloat;
  const auto operand = [&](const void* data, cudaDataType type, bool plain, int rows, int columns, int leading) {
    const at::Tensor stored =
        matrix(data, plain ? rows : columns, plain ? columns : rows, leading, scalar_type(type)).to(compute);
    return plain ? stored : stored.t();
  };
  const auto scale = [&](const void* value) {
    return wide ? *static_cast<const double*>(value) : *static_cast<const float*>(value);
  };
  const at::Tensor product = at::mm(operand(A, Atype, plain_a, m, k, lda), operand(B, Btype, plain_b, k, n, ldb));
  const at::Tensor out = matrix(C, m, n, ldc, scalar_type(Ctype));
  out.copy_(product * scale(alpha) + out.to(compute) * scale(beta));
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasDtrsm(cublasHandle_t handle, cublasSideMode_t side, cublasFillMode_t uplo, cublasOperation_t trans,
                           cublasDiagType_t diag, int m, int n, const double* alpha, const double* A, int lda,
                           double* B, int ldb) {
  const int size = side == CUBLAS_SIDE_LEFT ? m : n;
  if (handle == nullptr || m < 0 || n < 0 || lda < size || ldb < m) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  const at::Tensor stored = matrix(A, size, size, lda), right = matrix(B, m, n, ldb);
  const bool transposed = trans == CUBLAS_OP_T, upper = (uplo == CUBLAS_FILL_MODE_UPPER) != transposed;
  right.copy_(at::linalg_solve_triangular(transposed ? stored.mT() : stored, right * *alpha, upper,
                                          side == CUBLAS_SIDE_LEFT, diag == CUBLAS_DIAG_UNIT));
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasDtrsmBatched(cublasHandle_t handle, cublasSideMode_t side, cublasFillMode_t uplo,
                                  cublasOperation_t trans, cublasDiagType_t diag, int m, int n, const double* alpha,
                                  const double* const A[], int lda, double* const B[], int ldb, int batchCount) {
  for (int entry = 0; entry < batchCount; ++entry) {
    const auto status = cublasDtrsm(handle, side, uplo, trans, diag, m, n, alpha, A[entry], lda, B[entry], ldb);
    if (status != CUBLAS_STATUS_SUCCESS) {
      return status;
    }
  }
  return CUBLAS_STATUS_SUCCESS;
}

cusolverStatus_t cusolverDnCreate(cusolverDnHandle_t* handle) {
  *handle = new EmulatedSolver;
  return CUSOLVER_STATUS_SUCCESS;
}

cusolverStatus_t cusolverDnCreateParams(cusolverDnParams_t* params) {
  *params = new EmulatedSolverParams;
  return CUSOLVER_STATUS_SUCCESS;
}

cusolverStatus_t cusolverDnSetStream(cusolverDnHandle_t handle, cudaStream_t) {
  return handle == nullptr ? CUSOLVER_STATUS_INVALID_VALUE : CUSOLVER_STATUS_SUCCESS;
}

cusolverStatus_t cusolverDnDpotrfBatched(cusolverDnHandle_t handle, cublasFillMode_t uplo, int n, double* Aarray[],
                                         int lda, int* infoArray, int batchSize) {
  if (!fits(handle, n, lda, CUDA_R_64F)) {
    return CUSOLVER_STATUS_INVALID_VALUE;
  }
  for (int entry = 0; entry < batchSize; ++entry) {
    factor(matrix(Aarray[entry], n, n, lda), uplo, infoArray + entry);
  }
  return CUSOLVER_STATUS_SUCCESS;
}

cusolverStatus_t cusolverDnXpotrf_bufferSize(cusolverDnHandle_t handle, cusolverDnParams_t params, cublasFillMode_t,
                                             int64_t n, cudaDataType dataTypeA, const void*, int64_t lda,
                                             cudaDataType computeType, size_t* workspaceInBytesOnDevice,
                                             size_t* workspaceInBytesOnHost) {
  *workspaceInBytesOnDevice = device_bytes(n, 1);
  *workspaceInBytesOnHost = kHostBytes;
  return fits(handle, n, lda, dataTypeA) && params != nullptr && computeType == CUDA_R_64F
             ? CUSOLVER_STATUS_SUCCESS
             : CUSOLVER_STATUS_INVALID_VALUE;
}

cusolverStatus_t cusolverDnXpotrf(cusolverDnHandle_t handle, cusolverDnParams_t params, cublasFillMode_t uplo,
                                  int64_t n, cudaDataType dataTypeA, void* A, int64_t lda, cudaDataType computeType,
                                  void* bufferOnDevice, size_t workspaceInBytesOnDevice, void* bufferOnHost,
                                  size_t workspaceInBytesOnHost, int* info) {
  if (!fits(handle, n, lda, dataTypeA) || params == nullptr || computeType != CUDA_R_64F ||
      !spoil(bufferOnDevice, workspaceInBytesOnDevice, device_bytes(n, 1), bufferOnHost, workspaceInBytesOnHost)) {
    return CUSOLVER_STATUS_INVALID_VALUE;
  }
  factor(matrix(A, n, n, lda), uplo, info);
  return CUSOLVER_STATUS_SUCCESS;
}

cusolverStatus_t cusolverDnXsyevd_bufferSize(cusolverDnHandle_t handle, cusolverDnParams_t params,
                                             cusolverEigMode_t jobz, cublasFillMode_t uplo, int64_t n,
                                             cudaDataType dataTypeA, const void* A, int64_t lda, cudaDataType dataTypeW,
                                             const void* W, cudaDataType computeType, size_t* workspaceInBytesOnDevice,
                                             size_t* workspaceInBytesOnHost) {
  return cusolverDnXsyevBatched_bufferSize(handle, params, jobz, uplo, n, dataTypeA, A, lda, dataTypeW, W, computeType,
                                           workspaceInBytesOnDevice, workspaceInBytesOnHost, 1);
}

cusolverStatus_t cusolverDnXsyevd(cusolverDnHandle_t handle, cusolverDnParams_t params, cusolverEigMode_t jobz,
                                  cublasFillMode_t uplo, int64_t n, cudaDataType dataTypeA, void* A, int64_t lda,
                                  cudaDataType dataTypeW, void* W, cudaDataType computeType, void* bufferOnDevice,
                                  size_t workspaceInBytesOnDevice, void* bufferOnHost, size_t workspaceInBytesOnHost,
                                  int* info) {
  return cusolverDnXsyevBatched(handle, params, jobz, uplo, n, dataTypeA, A, lda, dataTypeW, W, computeType,
                                bufferOnDevice, workspaceInBytesOnDevice, bufferOnHost, workspaceInBytesOnHost, info,
                                1);
}

cusolverStatus_t cusolverDnXsyevBatched_bufferSize(cusolverDnHandle_t handle, cusolverDnParams_t params,
                                                   cusolverEigMode_t, cublasFillMode_t, int64_t n,
                                                   cudaDataType dataTypeA, const void* A, int64_t lda,
                                                   cudaDataType dataTypeW, const void* W, cudaDataType computeType,
                                                   size_t* workspaceInBytesOnDevice, size_t* workspaceInBytesOnHost,
                                                   int64_t batchSize) {
  *workspaceInBytesOnDevice = device_bytes(n, batchSize);
  *workspaceInBytesOnHost = kHostBytes;
  return fits(handle, n, lda, dataTypeA) && params != nullptr && A != nullptr && W != nullptr &&
                 dataTypeW == CUDA_R_64F && computeType == CUDA_R_64F
             ? CUSOLVER_STATUS_SUCCESS
             : CUSOLVER_STATUS_INVALID_VALUE;
}

cusolverStatus_t cusolverDnXsyevBatched(cusolverDnHandle_t handle, cusolverDnParams_t params, cusolverEigMode_t jobz,
                                        cublasFillMode_t uplo, int64_t n, cudaDataType dataTypeA, void* A, int64_t lda,
                                        cudaDataType dataTypeW, void* W, cudaDataType computeType, void* bufferOnDevice,
                                        size_t workspaceInBytesOnDevice, void* bufferOnHost,
                                        size_t workspaceInBytesOnHost, int* info, int64_t batchSize) {
  if (!fits(handle, n, lda, dataTypeA) || params == nullptr || dataTypeW != CUDA_R_64F || computeType != CUDA_R_64F ||
      !spoil(bufferOnDevice, workspaceInBytesOnDevice, device_bytes(n, batchSize), bufferOnHost,
             workspaceInBytesOnHost)) {
    return CUSOLVER_STATUS_INVALID_VALUE;
  }
  for (int64_t entry = 0; entry < batchSize; ++entry) {
    eigen(matrix(static_cast<double*>(A) + entry * lda * n, n, n, lda), uplo, jobz == CUSOLVER_EIG_MODE_VECTOR,
          static_cast<double*>(W) + entry * n, info + entry);
  }
  return CUSOLVER_STATUS_SUCCESS;
}

// The libraries count columns first, so that they see every matrix here transposed: a lower triangle is their upper
// one, eigenvectors in their columns are rows here, and X L = R is their L^T X^T = R^T with L^T as it lies in memory.
#include <cublas_v2.h>
#include <cusolverDn.h>

#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "kernels/batched_linalg_cuda.h"
#include "kernels/launch.cuh"

namespace d2moe::kernels {

struct LibraryHandles {
  cusolverDnHandle_t solver = nullptr;
  cusolverDnParams_t parameters = nullptr;
  cublasHandle_t blas = nullptr;
};

namespace {

// Up to these sizes a call for the whole stack, above them a call for each matrix, which then fills the GPU by itself.
// Not measured yet.
#ifdef D2MOE_EMULATED
constexpr int64_t kLargestBatchedFactor = 7, kLargestBatchedEigen = 7, kLargestBatchedSolve = 7;  // tests see both
#else
constexpr int64_t kLargestBatchedFactor = 512;
constexpr int64_t kLargestBatchedEigen = 512;
constexpr int64_t kLargestBatchedSolve = 256;
#endif

constexpr size_t kAlignment = 256;  // of cudaMalloc

template <typename StatusType>
void check(StatusType status, const char* call) {
  if (static_cast<int>(status) != 0) {
    throw LibraryError(std::string(call) + " must succeed, got status " + std::to_string(static_cast<int>(status)));
  }
}

#define D2MOE_LIBRARY_CALL(function, ...) check(function(__VA_ARGS__), #function)

LibraryHandles create_handles() {
  LibraryHandles handles;
  D2MOE_LIBRARY_CALL(cusolverDnCreate, &handles.solver);
  D2MOE_LIBRARY_CALL(cusolverDnCreateParams, &handles.parameters);
  D2MOE_LIBRARY_CALL(cublasCreate, &handles.blas);
  return handles;
}

// Handles that no thread has at the moment, by device. Making one takes milliseconds and memory of the device.
struct HandlePool {
  std::mutex mutex;
  std::map<int, std::vector<LibraryHandles>> unused;
};

// Neither the pool nor a handle is ever destroyed: when the program ends the driver may be gone before them.
HandlePool& handle_pool() {
  static HandlePool* const pool = new HandlePool;
  return *pool;
}

// A thread's handles go back to the pool when it ends, so that there are as many as threads at a time.
struct ThreadHandles {
  std::map<int, LibraryHandles> by_device;

  ~ThreadHandles() {
    HandlePool& pool = handle_pool();
    const std::lock_guard<std::mutex> lock(pool.mutex);
    for (const auto& [device, handles] : by_device) {
      pool.unused[device].push_back(handles);
    }
  }
};

LibraryHandles take_handles(int device) {
  HandlePool& pool = handle_pool();
  const std::lock_guard<std::mutex> lock(pool.mutex);
  std::vector<LibraryHandles>& unused = pool.unused[device];
  if (unused.empty()) {
    return create_handles();
  }
  const LibraryHandles handles = unused.back();
  unused.pop_back();
  return handles;
}

const LibraryHandles& thread_handles(int device) {
  thread_local ThreadHandles mine;
  const auto found = mine.by_device.find(device);
  return found != mine.by_device.end() ? found->second
                                       : mine.by_device.emplace(device, take_handles(device)).first->second;
}

int as_int(int64_t size) {
  if (size > std::numeric_limits<int>::max()) {
    throw LibraryError("a stack's sizes must fit 32 bits, got " + std::to_string(size));
  }
  return static_cast<int>(size);
}

__global__ void fill_pointers(double* first, int64_t stride, int64_t count, double** pointers) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index < count) {
    pointers[index] = first + index * stride;
  }
}

// pointers[i] = first + i * stride, as the batched calls want them.
void launch_fill_pointers(double* first, int64_t stride, int64_t count, double** pointers, cudaStream_t stream) {
  constexpr int kThreads = 256;
  const auto blocks = static_cast<unsigned int>((count + kThreads - 1) / kThreads);
  check(launch(fill_pointers, dim3(blocks), dim3(kThreads), 0, stream, first, stride, count, pointers),
        "fill_pointers");
}

size_t pointer_bytes(int64_t count) {
  return (static_cast<size_t>(count) * sizeof(double*) + kAlignment - 1) / kAlignment * kAlignment;
}

cusolverEigMode_t eigen_mode(bool vectors) { return vectors ? CUSOLVER_EIG_MODE_VECTOR : CUSOLVER_EIG_MODE_NOVECTOR; }

struct Workspace {
  size_t device = 0, host = 0;
};

Workspace one_factor_workspace(const LibraryHandles& handles, const double* matrix, int64_t n) {
  Workspace bytes;
  D2MOE_LIBRARY_CALL(cusolverDnXpotrf_bufferSize, handles.solver, handles.parameters, CUBLAS_FILL_MODE_UPPER, n,
                     CUDA_R_64F, matrix, n, CUDA_R_64F, &bytes.device, &bytes.host);
  return bytes;
}

Workspace library_eigen_workspace(const LibraryHandles& handles, bool vectors, const double* stack, int64_t n,
                                  int64_t count, const double* values) {
  Workspace bytes;
  if (n <= kLargestBatchedEigen) {
    D2MOE_LIBRARY_CALL(cusolverDnXsyevBatched_bufferSize, handles.solver, handles.parameters, eigen_mode(vectors),
                       CUBLAS_FILL_MODE_UPPER, n, CUDA_R_64F, stack, n, CUDA_R_64F, values, CUDA_R_64F, &bytes.device,
                       &bytes.host, count);
  } else {
    D2MOE_LIBRARY_CALL(cusolverDnXsyevd_bufferSize, handles.solver, handles.parameters, eigen_mode(vectors),
                       CUBLAS_FILL_MODE_UPPER, n, CUDA_R_64F, stack, n, CUDA_R_64F, values, CUDA_R_64F, &bytes.device,
                       &bytes.host);
  }
  return bytes;
}

}  // namespace

BatchedLinalg::BatchedLinalg(int device, cudaStream_t stream) : handles_(thread_handles(device)), stream_(stream) {
  D2MOE_LIBRARY_CALL(cusolverDnSetStream, handles_.solver, stream);
  D2MOE_LIBRARY_CALL(cublasSetStream, handles_.blas, stream);
}

size_t BatchedLinalg::factor_workspace(double* stack, int64_t n, int64_t count) {
  return n <= kLargestBatchedFactor ? pointer_bytes(count) : one_factor_workspace(handles_, stack, n).device;
}

void BatchedLinalg::factor(double* stack, int64_t n, int64_t count, int* info, void* workspace,
                           size_t workspace_bytes) {
  if (n <= kLargestBatchedFactor) {
    auto* const pointers = static_cast<double**>(workspace);
    launch_fill_pointers(stack, n * n, count, pointers, stream_);
    D2MOE_LIBRARY_CALL(cusolverDnDpotrfBatched, handles_.solver, CUBLAS_FILL_MODE_UPPER, as_int(n), pointers, as_int(n),
                       info, as_int(count));
    return;
  }
  std::vector<std::byte> host(one_factor_workspace(handles_, stack, n).host);
  for (int64_t entry = 0; entry < count; ++entry) {
    D2MOE_LIBRARY_CALL(cusolverDnXpotrf, handles_.solver, handles_.parameters, CUBLAS_FILL_MODE_UPPER, n, CUDA_R_64F,
                       stack + entry * n * n, n, CUDA_R_64F, workspace, workspace_bytes, host.data(), host.size(),
                       info + entry);
  }
}

size_t BatchedLinalg::eigen_workspace(bool vectors, double* stack, int64_t n, int64_t count, double* values) {
  return library_eigen_workspace(handles_, vectors, stack, n, count, values).device;
}

// Not cusolverDnXsyevdx, which gives only the eigenvalues that belong to its vectors: all of them are asked for here.
void BatchedLinalg::eigen(bool vectors, double* stack, int64_t n, int64_t count, double* values, int* info,
                          void* workspace, size_t workspace_bytes) {
  std::vector<std::byte> host(library_eigen_workspace(handles_, vectors, stack, n, count, values).host);
  if (n <= kLargestBatchedEigen) {
    D2MOE_LIBRARY_CALL(cusolverDnXsyevBatched, handles_.solver, handles_.parameters, eigen_mode(vectors),
                       CUBLAS_FILL_MODE_UPPER, n, CUDA_R_64F, stack, n, CUDA_R_64F, values, CUDA_R_64F, workspace,
                       workspace_bytes, host.data(), host.size(), info, count);
    return;
  }
  for (int64_t entry = 0; entry < count; ++entry) {
    D2MOE_LIBRARY_CALL(cusolverDnXsyevd, handles_.solver, handles_.parameters, eigen_mode(vectors),
                       CUBLAS_FILL_MODE_UPPER, n, CUDA_R_64F, stack + entry * n * n, n, CUDA_R_64F, values + entry * n,
                       CUDA_R_64F, workspace, workspace_bytes, host.data(), host.size(), info + entry);
  }
}

size_t BatchedLinalg::solve_workspace(int64_t n, int64_t count) {
  return n <= kLargestBatchedSolve ? 2 * pointer_bytes(count) : 0;
}

void BatchedLinalg::solve(const double* lower, double* rows, int64_t n, int64_t num_rows, int64_t count,
                          void* workspace) {
  const double one = 1.0;
  if (n <= kLargestBatchedSolve) {
    auto* const lower_pointers = static_cast<double**>(workspace);
    double** const row_pointers = lower_pointers + pointer_bytes(count) / sizeof(double*);
    launch_fill_pointers(const_cast<double*>(lower), n * n, count, lower_pointers, stream_);
    launch_fill_pointers(rows, num_rows * n, count, row_pointers, stream_);
    D2MOE_LIBRARY_CALL(cublasDtrsmBatched, handles_.blas, CUBLAS_SIDE_LEFT, CUBLAS_FILL_MODE_UPPER, CUBLAS_OP_N,
                       CUBLAS_DIAG_NON_UNIT, as_int(n), as_int(num_rows), &one, lower_pointers, as_int(n), row_pointers,
                       as_int(n), as_int(count));
    return;
  }
  for (int64_t entry = 0; entry < count; ++entry) {
    D2MOE_LIBRARY_CALL(cublasDtrsm, handles_.blas, CUBLAS_SIDE_LEFT, CUBLAS_FILL_MODE_UPPER, CUBLAS_OP_N,
                       CUBLAS_DIAG_NON_UNIT, as_int(n), as_int(num_rows), &one, lower + entry * n * n, as_int(n),
                       rows + entry * num_rows * n, as_int(n));
  }
}

}  // namespace d2moe::kernels

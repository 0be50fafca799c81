// What a decomposition of a stack of matrices needs of cuSOLVER and cuBLAS, in float64:
//
//   factor   A = L L^T              A [count, n, n] -> L in its lower triangle; the upper one is scratch
//   eigen    A = W^T diag(w) W      A [count, n, n] -> w [count, n] ascending, and eigenvector j in row j of A
//   solve    X L = R                L [count, n, n], R [count, num_rows, n] -> X in R
//
// All matrices are contiguous and row-major, one after the other; of a symmetric one only the lower triangle is read.
// All pointers are the device's, all work goes to one stream, and nothing waits for it but what the libraries wait for
// themselves. A call of theirs that fails throws LibraryError. Not yet run on a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace d2moe::kernels {

// "cusolverDnXsyevd must succeed, got status 7"
class LibraryError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct LibraryHandles;

class BatchedLinalg {
 public:
  // `device` is the current one for as long as this lives, and the calling thread stays the same.
  BatchedLinalg(int device, cudaStream_t stream);

  // info [count] becomes 0, or the size of the first leading block that has no factor, after which the rest of that
  // matrix is scratch. The workspace, like the others aligned as cudaMalloc does, is needed until the stream is done.
  void factor(double* stack, int64_t n, int64_t count, int* info, void* workspace, size_t workspace_bytes);
  size_t factor_workspace(double* stack, int64_t n, int64_t count);

  // Without `vectors` the stack becomes scratch. info [count] becomes 0 where the iteration converged.
  void eigen(bool vectors, double* stack, int64_t n, int64_t count, double* values, int* info, void* workspace,
             size_t workspace_bytes);
  size_t eigen_workspace(bool vectors, double* stack, int64_t n, int64_t count, double* values);

  void solve(const double* lower, double* rows, int64_t n, int64_t num_rows, int64_t count, void* workspace);
  static size_t solve_workspace(int64_t n, int64_t count);

 private:
  const LibraryHandles& handles_;
  cudaStream_t stream_;
};

}  // namespace d2moe::kernels

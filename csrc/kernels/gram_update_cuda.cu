// matrix[i, j] = matrix[j, i] for i < j: a tile of the lower triangle is read by rows, turned around in shared memory,
// and written by rows.
#include "kernels/gram_update_cuda.h"
#include "kernels/launch.cuh"

namespace d2moe::kernels {

namespace {

constexpr int kTile = 32;
constexpr int kRows = 8;  // of threads: each takes kTile / kRows elements of a column

template <typename Element>
__global__ void __launch_bounds__(kTile* kRows) mirror(Element* matrix, int64_t n) {
  if (blockIdx.y < blockIdx.x) {
    return;
  }
  __shared__ Element tile[kTile][kTile + 1];  // + 1: a column's elements stand in different banks
  const int64_t row = static_cast<int64_t>(blockIdx.y) * kTile, column = static_cast<int64_t>(blockIdx.x) * kTile;
  for (int i = threadIdx.y; i < kTile; i += kRows) {
    if (row + i < n && column + threadIdx.x < n) {
      tile[i][threadIdx.x] = matrix[(row + i) * n + column + threadIdx.x];
    }
  }
  __syncthreads();
  for (int i = threadIdx.y; i < kTile; i += kRows) {
    const int64_t to_row = column + i, to_column = row + threadIdx.x;
    if (to_column < n && to_row < to_column) {
      matrix[to_row * n + to_column] = tile[threadIdx.x][i];
    }
  }
}

template <typename Element>
cudaError_t launch_mirror(Element* matrix, int64_t n, cudaStream_t stream) {
  const auto tiles = static_cast<unsigned int>((n + kTile - 1) / kTile);
  return launch(&mirror<Element>, dim3(tiles, tiles), dim3(kTile, kRows), 0, stream, matrix, n);
}

}  // namespace

cudaError_t launch_mirror_lower_triangle(void* matrix, ElementType type, int64_t n, cudaStream_t stream) {
  if (n == 0) {
    return cudaSuccess;
  }
  return type == ElementType::kFloat64 ? launch_mirror(static_cast<double*>(matrix), n, stream)
                                       : launch_mirror(static_cast<float*>(matrix), n, stream);
}

}  // namespace d2moe::kernels

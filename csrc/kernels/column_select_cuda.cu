// C_j = column_norms[j] * ||X[:, columns[j]]||_2 and the `keep` largest of them, in ascending order (paper eq. 9).
//
//   column_squares  X [T, in] -> squares [in] float64. A block takes 32 packs of columns and, with others, some of the
//                   rows; the last of a strip's blocks to finish adds their parts up, part after part.
//   select          one block: scores; the key of the last score kept, digit by digit of 8 bits from the top; then
//                   positions in order, 1024 at a time.
#include <type_traits>

#include "kernels/column_select_cuda.h"
#include "kernels/device_elements.cuh"
#include "kernels/device_warp.cuh"
#include "kernels/launch.cuh"
#include "kernels/moe_pairs.cuh"

namespace d2moe::kernels {

namespace {

constexpr int kSquareRows = 8;  // of threads in a block of column_squares
constexpr int kSelectThreads = 1024;
constexpr int kWarps = kSelectThreads / kLanes;
constexpr int kDigits = 256;

// The rows of X that a group sums: all of them,
struct AllRows {
  int64_t num_rows;
  __device__ int64_t count(int) const { return num_rows; }
  __device__ int64_t row(int, int64_t i) const { return i; }
};

// or those that a base multiplies; -1 for one that is not.
struct RowsOfBase {
  MoePairs pairs;
  BaseRows base_rows;
  const int32_t* order;  // null: all rows are looked at
  const int32_t* offsets;
  int32_t rows_per_x;
  __device__ int64_t count(int base) const {
    return order != nullptr ? offsets[base + 1] - offsets[base] : base_rows.count(pairs);
  }
  __device__ int64_t row(int base, int64_t i) const {
    if (order != nullptr) {
      return divide_row(order[offsets[base] + i], rows_per_x);
    }
    return base_of_row(pairs, base_rows, i) == base ? divide_row(i, rows_per_x) : -1;
  }
};

// What each thread adds up: kPack neighbouring columns of some rows.
template <typename Element, int kPack, typename Rows>
__device__ inline void add_squares(const Element* x, const Rows& rows, int64_t first_row, int64_t row_step,
                                   int64_t row_stride, double (&sums)[kPack]) {
  const int group = static_cast<int>(blockIdx.z);
  const int64_t count = rows.count(group);
  for (int64_t i = first_row; i < count; i += row_step) {
    const int64_t row = rows.row(group, i);
    if (row < 0) {
      continue;
    }
    const Pack<Element, kPack> values = *reinterpret_cast<const Pack<Element, kPack>*>(x + row * row_stride);
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      const double value = widen(values.values[e]);
      sums[e] += value * value;
    }
  }
}

// The block's sums of a column: those of its kSquareRows threads, in their order.
template <int kPack>
__device__ inline double block_total(const double (&shared)[kSquareRows][kLanes * kPack], int column) {
  double total = 0;
#pragma unroll
  for (int r = 0; r < kSquareRows; ++r) {
    total += shared[r][column];
  }
  return total;
}

template <typename Element, int kPack, typename Rows>
__global__ void __launch_bounds__(kLanes* kSquareRows)
    column_squares(const Element* __restrict__ x, Rows rows, int64_t in, int64_t row_stride,
                   double* __restrict__ partial, int32_t* __restrict__ counters, double* __restrict__ squares) {
  constexpr int kColumns = kLanes * kPack;
  __shared__ double shared[kSquareRows][kColumns];
  __shared__ bool last;
  const int64_t strip = static_cast<int64_t>(blockIdx.x) * kColumns, column = strip + threadIdx.x * kPack;
  double sums[kPack] = {};
  if (column < in) {
    const int64_t first = static_cast<int64_t>(blockIdx.y) * kSquareRows + threadIdx.y;
    add_squares<Element, kPack>(x + column, rows, first, static_cast<int64_t>(gridDim.y) * kSquareRows, row_stride,
                                sums);
  }
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    shared[threadIdx.y][threadIdx.x * kPack + e] = sums[e];
  }
  __syncthreads();
  const int thread = threadIdx.y * kLanes + threadIdx.x;
  partial += static_cast<int64_t>(blockIdx.z) * gridDim.y * in;
  squares += blockIdx.z * in;
  double* out = gridDim.y == 1 ? squares : partial + blockIdx.y * in;
  for (int c = thread; c < kColumns && strip + c < in; c += kLanes * kSquareRows) {
    out[strip + c] = block_total<kPack>(shared, c);
  }
  if (gridDim.y == 1) {
    return;
  }
  __threadfence();
  __syncthreads();
  if (thread == 0) {
    last = atomicAdd(counters + blockIdx.z * gridDim.x + blockIdx.x, 1) == static_cast<int>(gridDim.y) - 1;
  }
  __syncthreads();
  if (!last) {
    return;
  }
  __threadfence();
  for (int c = thread; c < kColumns && strip + c < in; c += kLanes * kSquareRows) {
    double total = 0;
    for (unsigned int part = 0; part < gridDim.y; ++part) {
      total += __ldcg(partial + part * in + strip + c);  // not from the first-level cache: other blocks wrote it
    }
    squares[strip + c] = total;
  }
}

// A key whose unsigned order is: larger score first.
__device__ inline uint32_t descending_key(float score) {
  const float value = isnan(score) ? __int_as_float(0x7f800000) : score + 0.0f;  // -0 becomes +0
  const uint32_t bits = __float_as_uint(value);
  return (bits & 0x80000000u) != 0 ? bits : ~(bits | 0x80000000u);
}

__device__ inline void write_scores(const double* squares, int64_t in, const float* column_norms,
                                    const int32_t* columns, uint32_t num_columns, float* scores) {
  for (uint32_t j = threadIdx.x; j < num_columns; j += kSelectThreads) {
    const int64_t column = columns == nullptr ? j : columns[j];
    const bool exists = 0 <= column && column < in;
    scores[j] = exists ? static_cast<float>(static_cast<double>(column_norms[j]) * sqrt(squares[column])) : 0.0f;
  }
  __syncthreads();
}

// How many keys that agree with `answer` in the bits `known` have each digit.
__device__ inline void count_digits(const float* scores, uint32_t num_columns, uint32_t answer, uint32_t known,
                                    int shift, int* counts) {
  if (threadIdx.x < kDigits) {
    counts[threadIdx.x] = 0;
  }
  __syncthreads();
  for (uint32_t start = 0; start < num_columns; start += kSelectThreads) {
    const uint32_t j = start + threadIdx.x;
    const uint32_t key = j < num_columns ? descending_key(scores[j]) : 0;
    const bool counted = j < num_columns && ((key ^ answer) & known) == 0;
    const uint32_t digit = counted ? (key >> shift) & (kDigits - 1) : kDigits;
    // Scores are much alike in their top digit: the lanes that share a digit add theirs at once.
    const unsigned int same = __match_any_sync(kAllLanes, digit);
    if (counted && threadIdx.x % kLanes == static_cast<unsigned int>(__ffs(static_cast<int>(same)) - 1)) {
      atomicAdd(counts + digit, __popc(same));
    }
  }
  __syncthreads();
}

struct Choice {
  uint32_t digit;
  int below;  // keys with a smaller digit
};

// The digit of the key of this rank, by the first warp.
__device__ inline void choose_digit(const int* counts, int rank, Choice* choice) {
  constexpr int kEach = kDigits / kLanes;
  if (threadIdx.x < kLanes) {
    int own = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      own += counts[threadIdx.x * kEach + i];
    }
    int below = lanes_below(own);
    if (below <= rank && rank < below + own) {
      uint32_t digit = threadIdx.x * kEach;
      for (; rank >= below + counts[digit]; ++digit) {
        below += counts[digit];
      }
      *choice = {digit, below};
    }
  }
  __syncthreads();
}

// The sums over lower threads of two small numbers in one, 16 bits each, and over all threads.
__device__ inline int threads_below(int value, int* warp_totals, int& total) {
  const int warp = threadIdx.x / kLanes, below = lanes_below(value);
  if (threadIdx.x % kLanes == kLanes - 1) {
    warp_totals[warp] = below + value;
  }
  __syncthreads();
  int before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    before += w < warp ? warp_totals[w] : 0;
    total += warp_totals[w];
  }
  __syncthreads();
  return before + below;
}

__device__ inline void write_selected(const float* scores, uint32_t num_columns, uint32_t last_kept, int num_ties,
                                      int* warp_totals, int32_t* selected) {
  int better_before = 0, ties_before = 0;
  for (uint32_t start = 0; start < num_columns; start += kSelectThreads) {
    const uint32_t j = start + threadIdx.x;
    const uint32_t key = j < num_columns ? descending_key(scores[j]) : 0;
    const bool better = j < num_columns && key < last_kept, tie = j < num_columns && key == last_kept;
    int total;
    const int below = threads_below((better ? 1 : 0) + (tie ? 1 << 16 : 0), warp_totals, total);
    const int ties = ties_before + (below >> 16);
    if (better || (tie && ties < num_ties)) {
      selected[better_before + (below & 0xffff) + (ties < num_ties ? ties : num_ties)] = static_cast<int32_t>(j);
    }
    better_before += total & 0xffff;
    ties_before += total >> 16;
  }
}

__global__ void __launch_bounds__(kSelectThreads)
    select(const double* __restrict__ squares, int64_t in, const float* __restrict__ column_norms,
           const int32_t* __restrict__ columns, uint32_t num_columns, uint32_t keep, float* scores, int32_t* selected) {
  __shared__ int counts[kDigits];
  __shared__ int warp_totals[kWarps];
  __shared__ Choice choice;
  const int64_t group = blockIdx.x;
  squares += group * in;
  column_norms += group * num_columns;
  columns = columns == nullptr ? nullptr : columns + group * num_columns;
  scores += group * num_columns;
  selected += group * keep;
  write_scores(squares, in, column_norms, columns, num_columns, scores);
  if (keep == 0) {
    return;
  }
  uint32_t answer = 0, known = 0;
  int rank = static_cast<int>(keep - 1);  // of the last score kept; in the end, among those equal to it
  for (int shift = 24; shift >= 0; shift -= 8) {
    count_digits(scores, num_columns, answer, known, shift, counts);
    choose_digit(counts, rank, &choice);
    answer |= choice.digit << shift;
    known |= static_cast<uint32_t>(kDigits - 1) << shift;
    rank -= choice.below;
    __syncthreads();
  }
  write_selected(scores, num_columns, answer, rank + 1, warp_totals, selected);
}

// X as it lies in memory, and where its squares go.
struct Squares {
  const void* x;
  int64_t in, row_stride, num_groups, num_parts;
  double* partial;
  int32_t* counters;
  double* squares;
};

template <typename Element, int kPack, typename Rows>
cudaError_t launch_packs(const Squares& a, const Rows& rows, cudaStream_t stream) {
  constexpr int kColumns = kLanes * kPack;
  const dim3 grid(static_cast<unsigned int>((a.in + kColumns - 1) / kColumns), static_cast<unsigned int>(a.num_parts),
                  static_cast<unsigned int>(a.num_groups));
  return launch(&column_squares<Element, kPack, Rows>, grid, dim3(kLanes, kSquareRows), 0, stream,
                static_cast<const Element*>(a.x), rows, a.in, a.row_stride, a.partial, a.counters, a.squares);
}

template <typename Rows>
cudaError_t launch_squares(const Squares& a, ElementType type, const Rows& rows, cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  visit_device_elements(a.x, type, [&](const auto* elements) {
    using Element = std::decay_t<decltype(*elements)>;
    constexpr int kPack = 16 / sizeof(Element);
    const bool packs = reinterpret_cast<uintptr_t>(a.x) % 16 == 0 && a.in % kPack == 0 && a.row_stride % kPack == 0;
    const auto launch_them = packs ? &launch_packs<Element, kPack, Rows> : &launch_packs<Element, 1, Rows>;
    status = launch_them(a, rows, stream);
  });
  return status;
}

}  // namespace

int64_t column_square_parts(int64_t num_rows, int64_t in, int num_processors) {
  constexpr int64_t kRowsEach = 4 * kSquareRows;  // four loads a thread at least
  const int64_t strips = in < 1 ? 1 : (in + kLanes * 8 - 1) / (kLanes * 8);
  const int64_t wanted = (4 * num_processors + strips - 1) / strips;
  const int64_t most = (num_rows + kRowsEach - 1) / kRowsEach, parts = wanted < most ? wanted : most;
  return parts < 1 ? 1 : parts < 65535 ? parts : 65535;
}

cudaError_t launch_column_squares(const void* x, ElementType type, int64_t num_rows, int64_t in, int64_t row_stride,
                                  int64_t num_parts, double* partial, int32_t* counters, double* squares,
                                  cudaStream_t stream) {
  const Squares arguments{x, in, row_stride, 1, num_parts, partial, counters, squares};
  return launch_squares(arguments, type, AllRows{num_rows}, stream);
}

cudaError_t launch_base_column_squares(const BaseSquares& a, cudaStream_t stream) {
  const Squares arguments{a.x,         a.in,      a.row_stride, a.base_rows.num_bases,
                          a.num_parts, a.partial, a.counters,   a.squares};
  const RowsOfBase rows{a.pairs, a.base_rows, a.sorted == nullptr ? nullptr : a.sorted->order,
                        a.sorted == nullptr ? nullptr : a.sorted->offsets, a.rows_per_x};
  return launch_squares(arguments, a.type, rows, stream);
}

cudaError_t launch_column_select(int64_t num_groups, const double* squares, int64_t in, const float* column_norms,
                                 const int32_t* columns, int64_t num_columns, int64_t keep, float* scores,
                                 int32_t* selected, cudaStream_t stream) {
  if (num_columns == 0) {
    return cudaSuccess;
  }
  return launch(&select, dim3(static_cast<unsigned int>(num_groups)), dim3(kSelectThreads), 0, stream, squares, in,
                column_norms, columns, static_cast<uint32_t>(num_columns), static_cast<uint32_t>(keep), scores,
                selected);
}

}  // namespace d2moe::kernels

// What the kernels use of CUDA's language and runtime, for a C++ compiler and a CPU: every thread of a block is a
// fiber, and a block's fibers take turns from one barrier to the next. For tests of what kernels compute, not of how
// fast.
//
// A barrier that some threads of a block never reach, or a collective that some lanes of a warp never reach, ends the
// program with a sentence. Turns go up or down through the threads, from block to block in turn, so that results which
// depend on the order show; copies of cp.async happen when they are waited for, and shared memory begins as NaN.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

using std::isnan;

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};

struct int2 {
  int x, y;
};

inline int2 make_int2(int x, int y) { return {x, y}; }

struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};

inline uint4 make_uint4(unsigned int x, unsigned int y, unsigned int z, unsigned int w) { return {x, y, z, w}; }

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated_cuda {

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);
unsigned char* dynamic_shared();
void block_barrier();

constexpr int kWarp = 32;
constexpr size_t kMostBytes = 64;  // that a lane brings to a collective

// Waits until every lane of the warp has brought its bytes; lane i's then stand at [i].
using LaneBytes = unsigned char[kMostBytes];
const LaneBytes* exchange(const void* bytes, size_t count);
int lane();

template <typename Value>
Value of_lane(const LaneBytes* lanes, int i) {
  Value value;
  std::memcpy(&value, lanes[i], sizeof(Value));
  return value;
}

// Ends the program with `what` where the address is not a multiple of `bytes`.
void check_aligned(const void* address, size_t bytes, const char* what);
void copy_later(void* destination, const void* source, size_t bytes);
void close_copies();
void wait_copies(int open_groups);

}  // namespace emulated_cuda

inline void __syncthreads() { emulated_cuda::block_barrier(); }
inline void __syncwarp(unsigned int = 0xffffffffu) { emulated_cuda::exchange(nullptr, 0); }
inline void __threadfence() {}

template <typename Value>
Value emulated_shuffle(Value value, int source) {
  const auto* lanes = emulated_cuda::exchange(&value, sizeof(Value));
  return 0 <= source && source < emulated_cuda::kWarp ? emulated_cuda::of_lane<Value>(lanes, source) : value;
}

template <typename Value>
Value __shfl_sync(unsigned int, Value value, int source) {
  return emulated_shuffle(value, source % emulated_cuda::kWarp);
}
template <typename Value>
Value __shfl_up_sync(unsigned int, Value value, int step) {
  return emulated_shuffle(value, emulated_cuda::lane() - step);
}

template <typename Value>
unsigned int __match_any_sync(unsigned int, Value value) {
  const auto* lanes = emulated_cuda::exchange(&value, sizeof(Value));
  unsigned int same = 0;
  for (int i = 0; i < emulated_cuda::kWarp; ++i) {
    same |= (emulated_cuda::of_lane<Value>(lanes, i) == value ? 1u : 0u) << i;
  }
  return same;
}

inline unsigned int __ballot_sync(unsigned int, int predicate) {
  const auto* lanes = emulated_cuda::exchange(&predicate, sizeof(int));
  unsigned int mask = 0;
  for (int i = 0; i < emulated_cuda::kWarp; ++i) {
    mask |= (emulated_cuda::of_lane<int>(lanes, i) != 0 ? 1u : 0u) << i;
  }
  return mask;
}

inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __popc(unsigned int value) { return __builtin_popcount(value); }
inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}
template <typename Value>
Value __ldcg(const Value* address) {
  return *address;
}
inline unsigned int __float_as_uint(float value) {
  unsigned int bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }

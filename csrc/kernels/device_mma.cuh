// Tensor cores and asynchronous copies, sm_80 on; and what they do on a CPU where tests run kernels there.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "kernels/device_elements.cuh"

namespace d2moe::kernels {

// 16 bytes from global to shared memory, both at multiples of 16 bytes; there once their group has been waited for.
__device__ inline void copy_16_bytes_later(void* shared, const void* global) {
#ifdef D2MOE_EMULATED
  emulated_cuda::copy_later(shared, global, 16);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
#endif
}

// Ends a group of copies of this thread.
__device__ inline void close_copies() {
#ifdef D2MOE_EMULATED
  emulated_cuda::close_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kOpen of this thread's closed groups are on their way.
template <int kOpen>
__device__ inline void wait_copies() {
#ifdef D2MOE_EMULATED
  emulated_cuda::wait_copies(kOpen);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
#endif
}

// Four 8 x 8 matrices of 16-bit elements, whose rows lie where the lanes say: lane 8 i + j says where row j of matrix i
// is. Lane l gets, of each, elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4; of the transposed matrices if
// kTransposed.
template <bool kTransposed>
__device__ inline void load_matrices(uint32_t (&registers)[4], const void* row) {
#ifdef D2MOE_EMULATED
  emulated_cuda::check_aligned(row, 16, "ldmatrix must have aligned rows, got one that is not");
  const auto* rows = emulated_cuda::exchange(&row, sizeof(row));
  const int lane = emulated_cuda::lane();
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      const int r = kTransposed ? lane % 4 * 2 + e : lane / 4, c = kTransposed ? lane / 4 : lane % 4 * 2 + e;
      pair[e] = emulated_cuda::of_lane<const uint16_t*>(rows, 8 * i + r)[c];
    }
    std::memcpy(&registers[i], pair, sizeof(pair));
  }
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}

// sums [16, 8] += a [16, 16] b [16, 8], as the lanes hold them: a from the rows of a, b from the rows of b's transpose,
// or from the rows of b by load_matrices<true>. Lane l holds the sums of row l / 4 (0, 1) and row l / 4 + 8 (2, 3),
// columns 2 (l % 4) and 2 (l % 4) + 1.
template <typename Element>
__device__ inline void multiply_matrices(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef D2MOE_EMULATED
  const uint32_t own[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const auto* lanes = emulated_cuda::exchange(own, sizeof(own));
  const int lane = emulated_cuda::lane();
  const auto element = [&](int from, int which, int e) {
    Element value;
    std::memcpy(&value, lanes[from] + 4 * which + 2 * e, sizeof(value));
    return widen(value);
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int holder = k % 8 / 2;
      const float left = element(row * 4 + holder, k / 8 * 2 + i / 2, k % 2);
      sums[i] += left * element(column * 4 + holder, 4 + k / 8, k % 2);
    }
  }
#else
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

}  // namespace d2moe::kernels

// bfloat16 weights and x, two products at a time; other weights as in product_kernels_avx512.cpp.
#include <cstring>
#include <type_traits>

#include "kernels/product_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include "kernels/x86_intrinsics.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c")
#endif

#include "kernels/product_kernels_avx512.h"
#include "kernels/product_loops.h"

namespace d2moe::kernels {

namespace {

struct BFloat16Pairs : Avx512 {
  using Weight = BFloat16;
  using Input = BFloat16;
  using Operand = __m512i;  // 16 pairs
  static constexpr int kDepth = 2;

  static Operand load(const BFloat16* source) { return _mm512_loadu_si512(source); }
  static Operand load_part(const BFloat16* source, int64_t count) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), source);
  }
  static Vector multiply_add(Operand weights, Operand input, Vector sums) {
    return _mm512_dpbf16_ps(sums, (__m512bh)weights, (__m512bh)input);
  }
  static void transpose(Operand* tile) { transpose_16(tile); }
  // Two channels' outputs n to n + 31 as pairs, in their order.
  template <bool whole>
  static void load_channels(const Weight* const* source, int64_t n, Operand& low, Operand& high) {
    const __m512i first = load(source[0] + n);
    const __m512i second = whole ? load(source[1] + n) : _mm512_setzero_si512();
    const __m512i pair = _mm512_set1_epi32(0x00200000);  // indices: element i of the first, and 32 + i of the second
    const __m512i steps = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i low_index = _mm512_add_epi32(pair, _mm512_or_si512(steps, _mm512_slli_epi32(steps, 16)));
    const __m512i high_index = _mm512_add_epi32(low_index, _mm512_set1_epi32(0x00100010));
    low = _mm512_permutex2var_epi16(first, low_index, second);
    high = _mm512_permutex2var_epi16(first, high_index, second);
  }
  template <bool whole>
  static Operand broadcast(const Input* x) {
    if constexpr (whole) {
      int32_t pair;
      std::memcpy(&pair, x, sizeof(pair));
      return _mm512_set1_epi32(pair);
    } else {
      return _mm512_set1_epi32(x->bits);
    }
  }
};

}  // namespace

const ProductKernels* product_kernels_avx512_bf16(ElementType weights) {
  return kernels_for<Float32Products<Avx512, float>, BFloat16Pairs, Float32Products<Avx512, Float16>>("avx512_bf16",
                                                                                                      weights);
}

}  // namespace d2moe::kernels

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace d2moe::kernels {
const ProductKernels* product_kernels_avx512_bf16(ElementType) { return nullptr; }
}  // namespace d2moe::kernels

#endif

#include <type_traits>

#include "kernels/product_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include "kernels/x86_intrinsics.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "kernels/product_loops.h"

namespace d2moe::kernels {

namespace {

struct Avx2 {
  using Vector = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kRowTile = 2;  // 2 x 4 sums, 4 weights and an input of 16 registers
  static constexpr int kFirstRows = kRowTile;
  static constexpr int kLineRows = 1;
  static constexpr int kChannelRows = 2;
  static constexpr int kSteps = 4;
  static constexpr bool kPacks = true;
  static constexpr int kPackedRows = 6;

  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector load_floats(const float* source) { return _mm256_loadu_ps(source); }
  static Vector load_floats(const BFloat16* source) {
    const __m128i bits = _mm_loadu_si128((const __m128i*)source);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static Vector load_floats(const Float16* source) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)source)); }
  template <typename Element>
  static Vector load_floats(const Element* source, int64_t count) {
    Element part[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) {
      part[i] = source[i];
    }
    return load_floats(part);
  }
  static void store_sums(float* sums, Vector value) { _mm256_storeu_ps(sums, value); }
  static Vector broadcast_float(float value) { return _mm256_set1_ps(value); }
  static Vector multiply_add(Vector weights, Vector input, Vector sums) {
    return _mm256_fmadd_ps(weights, input, sums);
  }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static __m128 totals(Vector a, Vector b, Vector c, Vector d) {
    const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
  }
  static float total(Vector a) { return _mm_cvtss_f32(totals(a, zero(), zero(), zero())); }
  static void add_four_totals(const Vector* sums, float* out) {
    _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), totals(sums[0], sums[1], sums[2], sums[3])));
  }
  static void transpose(Vector* tile) {
    __m256 a[8], b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      a[2 * i] = _mm256_unpacklo_ps(tile[2 * i], tile[2 * i + 1]);
      a[2 * i + 1] = _mm256_unpackhi_ps(tile[2 * i], tile[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
      b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
      b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
      b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      tile[i] = _mm256_permute2f128_ps(b[i], b[4 + i], 0x20);
      tile[4 + i] = _mm256_permute2f128_ps(b[i], b[4 + i], 0x31);
    }
  }
};

}  // namespace

const ProductKernels* product_kernels_avx2(ElementType weights) { return float32_kernels_for<Avx2>("avx2", weights); }

}  // namespace d2moe::kernels

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace d2moe::kernels {
const ProductKernels* product_kernels_avx2(ElementType) { return nullptr; }
}  // namespace d2moe::kernels

#endif

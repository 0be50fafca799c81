// The vectors that the two AVX-512 files share. Included below their switch, like product_loops.h.
namespace d2moe::kernels {
namespace {

// 16 x 16 elements of 32 bits, rows become columns.
inline void transpose_16(__m512i* rows) {
  __m512i a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  // Of four rows each: column 0 of every 128 bits, then 1, 2 and 3.
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
  }
  // Blocks of 128 bits: those of rows 0 to 3, 4 to 7, 8 to 11 and 12 to 15 come together.
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i low_even = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88);
    const __m512i low_odd = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd);
    const __m512i high_even = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88);
    const __m512i high_odd = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd);
    rows[i] = _mm512_shuffle_i32x4(low_even, high_even, 0x88);
    rows[8 + i] = _mm512_shuffle_i32x4(low_even, high_even, 0xdd);
    rows[4 + i] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
    rows[12 + i] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
  }
}

inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

inline __m512 widen_bfloat16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

struct Avx512 {
  using Vector = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kRowTile = 6;    // 6 x 4 sums, 4 weights and an input fill the 32 registers
  static constexpr int kFirstRows = 8;  // 8 x 3 sums
  static constexpr int kLineRows = 4;
  static constexpr int kChannelRows = 4;
  // One row of x reads channels at 27 GB/s on one core with 4 steps and 25 with 8; 6 rows at 20 and 17.
  static constexpr int kSteps = 4;
  static constexpr bool kPacks = true;
  static constexpr int kPackedRows = 12;  // 12 x 2 sums, 2 weights and an input

  static Vector zero() { return _mm512_setzero_ps(); }
  // 16 elements, or the first `count` of them and zeros.
  static Vector load_floats(const float* source) { return _mm512_loadu_ps(source); }
  static Vector load_floats(const BFloat16* source) {
    return widen_bfloat16(_mm256_loadu_si256((const __m256i*)source));
  }
  static Vector load_floats(const Float16* source) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)source));
  }
  static Vector load_floats(const float* source, int64_t count) {
    return _mm512_maskz_loadu_ps(first_lanes(count), source);
  }
  static Vector load_floats(const BFloat16* source, int64_t count) {
    return widen_bfloat16(_mm256_maskz_loadu_epi16(first_lanes(count), source));
  }
  static Vector load_floats(const Float16* source, int64_t count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), source));
  }
  static void store_sums(float* sums, Vector value) { _mm512_storeu_ps(sums, value); }
  static Vector broadcast_float(float value) { return _mm512_set1_ps(value); }
  static Vector multiply_add(Vector weights, Vector input, Vector sums) {
    return _mm512_fmadd_ps(weights, input, sums);
  }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static float total(Vector a) { return _mm512_reduce_add_ps(a); }
  static void add_four_totals(const Vector* sums, float* out) {
    const Vector ab = _mm512_add_ps(_mm512_unpacklo_ps(sums[0], sums[1]), _mm512_unpackhi_ps(sums[0], sums[1]));
    const Vector cd = _mm512_add_ps(_mm512_unpacklo_ps(sums[2], sums[3]), _mm512_unpackhi_ps(sums[2], sums[3]));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const Vector abcd = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    const __m128 totals = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), totals));
  }
  static void transpose(Vector* tile) {
    __m512i bits[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      bits[i] = _mm512_castps_si512(tile[i]);
    }
    transpose_16(bits);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      tile[i] = _mm512_castsi512_ps(bits[i]);
    }
  }
};

}  // namespace
}  // namespace d2moe::kernels

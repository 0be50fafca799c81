// Plain loops over arrays of eight floats, which a compiler turns into whatever vectors its target has.
#include <type_traits>

#include "kernels/product_kernels.h"
#include "kernels/product_loops.h"

namespace d2moe::kernels {

namespace {

struct EightFloats {
  float values[8];
};

template <typename WeightType>
struct Portable {
  using Weight = WeightType;
  using Input = float;
  using Vector = EightFloats;
  using Operand = EightFloats;
  static constexpr int kLanes = 8;
  static constexpr int kDepth = 1;
  static constexpr int kRowTile = 2;
  static constexpr int kWideRows = 0;
  static constexpr int kChannelRows = 2;
  static constexpr int kPackedRows = 3;
  // Never: compilers keep these sums in memory.
  static constexpr int64_t kManyRows = INT64_MAX;
  static constexpr int64_t kManyRowsByRow = INT64_MAX;
  static constexpr int kSteps = 4;

  static Vector zero() { return {}; }
  static Vector load_sums(const float* sums) { return load(sums); }
  static void store_sums(float* sums, const Vector& value) {
    for (int i = 0; i < kLanes; ++i) {
      sums[i] = value.values[i];
    }
  }
  template <typename Element>
  static Operand load(const Element* source) {
    Operand result;
    for (int i = 0; i < kLanes; ++i) {
      result.values[i] = to_float(source[i]);
    }
    return result;
  }
  template <typename Element>
  static Operand load_part(const Element* source, int64_t count) {
    Operand result = {};
    for (int64_t i = 0; i < count; ++i) {
      result.values[i] = to_float(source[i]);
    }
    return result;
  }
  static Vector multiply_add(const Operand& weights, const Operand& input, Vector sums) {
    for (int i = 0; i < kLanes; ++i) {
      sums.values[i] += weights.values[i] * input.values[i];
    }
    return sums;
  }
  template <bool whole>
  static void load_channels(const Weight* const* source, int64_t n, Operand& low, Operand& high) {
    low = load(source[0] + n);
    high = load(source[0] + n + kLanes);
  }
  template <bool whole>
  static Operand broadcast(const Input* x) {
    Operand result;
    for (float& value : result.values) {
      value = *x;
    }
    return result;
  }
  static void transpose(Operand* tile) {
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < i; ++j) {
        const float value = tile[i].values[j];
        tile[i].values[j] = tile[j].values[i];
        tile[j].values[i] = value;
      }
    }
  }
  template <int N>
  static void add_totals(const Vector* sums, float* out) {
    for (int i = 0; i < N; ++i) {
      const float* v = sums[i].values;
      out[i] += ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
    }
  }
};

}  // namespace

const ProductKernels* product_kernels_portable(ElementType weights) {
  static const ProductKernels of_float = kernels_of<Portable<float>>("portable", ElementType::kFloat32);
  static const ProductKernels of_bfloat16 = kernels_of<Portable<BFloat16>>("portable", ElementType::kFloat32);
  static const ProductKernels of_float16 = kernels_of<Portable<Float16>>("portable", ElementType::kFloat32);
  switch (weights) {
    case ElementType::kBFloat16:
      return &of_bfloat16;
    case ElementType::kFloat16:
      return &of_float16;
    default:
      return &of_float;
  }
}

}  // namespace d2moe::kernels

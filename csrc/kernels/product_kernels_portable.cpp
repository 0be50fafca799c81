// Plain loops over arrays of eight floats, which a compiler turns into whatever vectors its target has.
#include <cstring>
#include <type_traits>

#include "kernels/product_kernels.h"
#include "kernels/product_loops.h"

namespace d2moe::kernels {

namespace {

struct EightFloats {
  float values[8];
};

struct Portable {
  using Vector = EightFloats;
  static constexpr int kLanes = 8;
  static constexpr int kRowTile = 2;
  static constexpr int kFirstRows = kRowTile;
  static constexpr int kLineRows = 0;
  static constexpr int kChannelRows = 2;
  static constexpr int kSteps = 4;
  static constexpr bool kPacks = false;  // compilers keep a packed tile's sums in memory

  static Vector zero() { return {}; }
  template <typename Element>
  static Vector load_floats(const Element* source) {
    return load_floats(source, kLanes);
  }
  template <typename Element>
  static Vector load_floats(const Element* source, int64_t count) {
    Vector result = {};
    for (int64_t i = 0; i < count; ++i) {
      result.values[i] = to_float(source[i]);
    }
    return result;
  }
  static void store_sums(float* sums, const Vector& value) { std::memcpy(sums, value.values, sizeof(value.values)); }
  static Vector broadcast_float(float value) { return {value, value, value, value, value, value, value, value}; }
  static Vector multiply_add(const Vector& weights, const Vector& input, Vector sums) {
    for (int i = 0; i < kLanes; ++i) {
      sums.values[i] += weights.values[i] * input.values[i];
    }
    return sums;
  }
  static float total(const Vector& a) {
    const float* v = a.values;
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
  }
  static void add_four_totals(const Vector* sums, float* out) {
    for (int i = 0; i < 4; ++i) {
      out[i] += total(sums[i]);
    }
  }
};

}  // namespace

const ProductKernels* product_kernels_portable(ElementType weights) {
  return float32_kernels_for<Portable>("portable", weights);
}

}  // namespace d2moe::kernels

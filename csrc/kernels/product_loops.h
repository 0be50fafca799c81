// The loops of product_kernels.h over the vectors of an instruction set. No include guard, and no code of others: a
// file that switches an instruction set on includes this below the switch, once, and all is that file's own.
//
// A file says what its vectors are, in a type such as Avx2 (product_kernels_avx2.cpp):
//   Vector, kLanes         of float32: loaded, stored, multiplied, added up, transposed
//   kRowTile, kFirstRows   rows of x that a row product takes at a time, with 4 outputs or 3; the first rows of several
//   kLineRows              up to how many rows of x read weights line after line
//   kChannelRows, kSteps   rows of x, and loads of channels held in registers, of a product by channel
//   kPacks, kPackedRows    whether many rows are multiplied with packed weights, and how many at a time
// and Float32Products, or a type of its own like it, says what is multiplied:
//   Weight, Input          elements of W and of x
//   Operand                what a multiplication takes: kDepth inputs of each of kLanes outputs (by channel), or
//                          kDepth * kLanes inputs of one (by row)
#include "kernels/tuning_cpu.h"

// Its two parts.
#include "kernels/product_few_rows.h"
#include "kernels/product_many_rows.h"

namespace d2moe::kernels {
namespace {

// Weights of any type, made float32 as they are loaded; x in float32.
template <typename Vectors, typename WeightType>
struct Float32Products : Vectors {
  using Weight = WeightType;
  using Input = float;
  using Operand = typename Vectors::Vector;
  static constexpr int kDepth = 1;

  template <typename Element>
  static Operand load(const Element* source) {
    return Vectors::load_floats(source);
  }
  template <typename Element>
  static Operand load_part(const Element* source, int64_t count) {
    return Vectors::load_floats(source, count);
  }
  template <bool whole>
  static void load_channels(const Weight* const* source, int64_t n, Operand& low, Operand& high) {
    low = Vectors::load_floats(source[0] + n);
    high = Vectors::load_floats(source[0] + n + Vectors::kLanes);
  }
  template <bool whole>
  static Operand broadcast(const Input* x) {
    return Vectors::broadcast_float(*x);
  }
};

template <typename Isa>
void multiply_rows(const RowProduct& p) {
  if (p.num_rows == 0) {
    return;
  }
  int64_t done = p.begin;
  if constexpr (Isa::kPacks) {
    if (p.num_rows >= tuning::kManyRowsByRow) {
      done = multiply_packed<Isa>(p);
    }
  }
  multiply_row_panels<Isa>(p, done);
}

// Either way an output's products are added in the order of the channels, step by step.
template <typename Isa>
void multiply_channels(const ChannelProduct& p) {
  if (p.num_rows == 0) {
    return;
  }
  if constexpr (Isa::kPacks) {
    if (p.num_rows >= tuning::kManyRowsByChannel) {
      return multiply_channel_rest<Isa>(p, multiply_packed<Isa>(p));
    }
  }
  if (p.num_rows <= tuning::kChannelAheadRows) {
    return multiply_channel_strips<Isa, true>(p);
  }
  multiply_channel_strips<Isa, false>(p);
}

template <typename Isa>
ProductKernels kernels_of(const char* instruction_set) {
  constexpr bool kPairs = std::is_same_v<typename Isa::Input, BFloat16>;
  return {instruction_set, kPairs ? ElementType::kBFloat16 : ElementType::kFloat32, &multiply_rows<Isa>,
          &multiply_channels<Isa>};
}

// Those for weights of a type, of the three that there are.
template <typename OfFloat, typename OfBFloat16, typename OfFloat16>
const ProductKernels* kernels_for(const char* instruction_set, ElementType weights) {
  static const ProductKernels of_float = kernels_of<OfFloat>(instruction_set);
  static const ProductKernels of_bfloat16 = kernels_of<OfBFloat16>(instruction_set);
  static const ProductKernels of_float16 = kernels_of<OfFloat16>(instruction_set);
  switch (weights) {
    case ElementType::kBFloat16:
      return &of_bfloat16;
    case ElementType::kFloat16:
      return &of_float16;
    default:
      return &of_float;
  }
}

template <typename Vectors>
const ProductKernels* float32_kernels_for(const char* instruction_set, ElementType weights) {
  return kernels_for<Float32Products<Vectors, float>, Float32Products<Vectors, BFloat16>,
                     Float32Products<Vectors, Float16>>(instruction_set, weights);
}

}  // namespace
}  // namespace d2moe::kernels

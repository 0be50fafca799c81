// The loops of product_kernels.h over the vectors of an instruction set. No include guard, and no #include but its two
// parts: a file that switches an instruction set on includes this below the switch, once, and all is that file's own.
//
// Isa says what a vector is:
//   Weight, Input          elements of W and of x
//   Vector                 float32 sums, kLanes of them
//   Operand                what a multiplication takes: kDepth inputs of each of kLanes outputs (by channel), or
//                          kDepth * kLanes inputs of one (by row)
//   kRowTile               rows of x that a row product takes at a time; kSteps: loads of channels held in registers
#include "kernels/product_few_rows.h"
#include "kernels/product_many_rows.h"

namespace d2moe::kernels {
namespace {

template <typename Isa>
void multiply_rows(const RowProduct& p) {
  if (p.num_rows >= Isa::kManyRowsByRow) {
    RowProduct rest = p;
    rest.begin = multiply_packed<Isa>(p);
    if (rest.begin < p.end) {
      float* out[tuning::kRowPanel];
      for (int64_t row = 0; row < p.num_rows; row += tuning::kRowPanel) {
        rest.x = p.x + row;
        rest.num_rows = p.num_rows - row < tuning::kRowPanel ? p.num_rows - row : tuning::kRowPanel;
        for (int64_t m = 0; m < rest.num_rows; ++m) {
          out[m] = p.out[row + m] + (rest.begin - p.begin);
        }
        rest.out = out;
        multiply_row_panels<Isa>(rest);
      }
    }
  } else if (p.num_rows > 0) {
    multiply_row_panels<Isa>(p);
  }
}

// Either way an output's products are added in the order of the channels, step by step.
template <typename Isa>
void multiply_channels(const ChannelProduct& p) {
  if constexpr (Isa::kManyRows == INT64_MAX) {
    multiply_channels_of_few_rows<Isa>(p);
  } else if (p.num_rows >= Isa::kManyRows) {
    const int64_t rest = multiply_packed<Isa>(p);
    multiply_channel_rest<Isa>(p, 0, p.num_inputs, 0, p.num_rows, rest, p.end);
  } else if (p.num_rows > 0) {
    multiply_channels_of_few_rows<Isa>(p);
  }
}

template <typename Isa>
ProductKernels kernels_of(const char* instruction_set, ElementType input_type) {
  return {instruction_set, input_type, &multiply_rows<Isa>, &multiply_channels<Isa>};
}

}  // namespace
}  // namespace d2moe::kernels

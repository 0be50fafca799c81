#include "kernels/dequantise_rows.h"

#include "kernels/round_element.h"

namespace d2moe::kernels {

namespace {

template <typename Element>
void dequantise_row(const int8_t* source, float scale, int64_t columns, Element* out) {
  for (int64_t j = 0; j < columns; ++j) {
    out[j] = round_to<Element>(scale * static_cast<float>(source[j]));
  }
}

}  // namespace

void dequantise_rows(const int8_t* source, const void* scales, ElementType type, int64_t row_begin, int64_t row_end,
                     int64_t columns, void* out) {
  visit_forward_type(type, [&](auto element) {
    using Element = decltype(element);
    for (int64_t i = row_begin; i < row_end; ++i) {
      dequantise_row(source + i * columns, to_float(static_cast<const Element*>(scales)[i]), columns,
                     static_cast<Element*>(out) + i * columns);
    }
  });
}

}  // namespace d2moe::kernels

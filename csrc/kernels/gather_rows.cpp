#include "kernels/gather_rows.h"

#include <cstring>
#include <type_traits>

namespace d2moe::kernels {

namespace {

template <typename Element>
void gather_row(const Element* source, const int32_t* columns, int64_t num_columns, const uint8_t* selected,
                Element* out) {
  if (columns == nullptr) {
    std::memcpy(out, source, num_columns * sizeof(Element));
  } else {
    for (int64_t j = 0; j < num_columns; ++j) {
      out[j] = source[columns[j]];
    }
  }
  if (selected != nullptr) {
    for (int64_t j = 0; j < num_columns; ++j) {
      out[j] = selected[j] != 0 ? out[j] : Element();
    }
  }
}

}  // namespace

void gather_rows(const void* source, ElementType type, int64_t row_stride, const int64_t* rows, int64_t row_begin,
                 int64_t row_end, const int32_t* columns, int64_t num_columns, const uint8_t* selected, void* out) {
  visit_elements(source, type, [&](const auto* elements) {
    using Element = std::remove_cv_t<std::remove_pointer_t<decltype(elements)>>;
    for (int64_t i = row_begin; i < row_end; ++i) {
      gather_row(elements + rows[i] * row_stride, columns, num_columns, selected,
                 static_cast<Element*>(out) + i * num_columns);
    }
  });
}

}  // namespace d2moe::kernels

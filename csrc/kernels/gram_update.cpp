#include "kernels/gram_update.h"

#include <algorithm>

namespace d2moe::kernels {

namespace {

// A tile and its mirror image, 32 x 32 each, stay in the first-level cache (16 KiB in float64), so that walking one of
// them down its columns costs no more than walking along its rows.
constexpr int64_t kTile = 32;

template <typename Element>
void mirror(Element* matrix, int64_t n, int64_t row_stride, int64_t column_stride, int64_t tile_begin,
            int64_t tile_end) {
  for (int64_t tile_row = tile_begin; tile_row < tile_end; ++tile_row) {
    const int64_t row_end = std::min((tile_row + 1) * kTile, n);
    for (int64_t tile_column = 0; tile_column <= tile_row; ++tile_column) {
      for (int64_t i = tile_row * kTile; i < row_end; ++i) {
        const int64_t column_end = std::min((tile_column + 1) * kTile, i);
        for (int64_t j = tile_column * kTile; j < column_end; ++j) {
          matrix[j * row_stride + i * column_stride] = matrix[i * row_stride + j * column_stride];
        }
      }
    }
  }
}

}  // namespace

int64_t mirror_tiles(int64_t n) { return (n + kTile - 1) / kTile; }

void mirror_lower_triangle(void* matrix, ElementType type, int64_t n, int64_t row_stride, int64_t column_stride,
                           int64_t tile_begin, int64_t tile_end) {
  if (type == ElementType::kFloat64) {
    mirror(static_cast<double*>(matrix), n, row_stride, column_stride, tile_begin, tile_end);
  } else {
    mirror(static_cast<float*>(matrix), n, row_stride, column_stride, tile_begin, tile_end);
  }
}

}  // namespace d2moe::kernels

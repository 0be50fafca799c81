// How products are cut into blocks, and which kernel multiplies them.
#include <algorithm>

#include "kernels/grouped_product.cuh"
#include "kernels/tuning_cuda.h"

namespace d2moe::kernels {

namespace {

struct TileSizes {
  int rows, outputs, depth;
};

template <typename Tile>
constexpr TileSizes sizes_of() {
  return {Tile::kRows, Tile::kOutputs, Tile::kDepth};
}

TileSizes tile_sizes(ElementType type, bool many_rows) {
  if (type == ElementType::kFloat32) {
    return many_rows ? sizes_of<ManyFloatRows>() : sizes_of<FewFloatRows>();
  }
  return many_rows ? sizes_of<ManyRows<__half>>() : sizes_of<FewRows<__half>>();
}

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

}  // namespace

int product_tile_rows(ElementType type, bool many_rows) { return tile_sizes(type, many_rows).rows; }

ProductGrid product_grid(const GroupedProduct& product, bool many_rows, const ProductSize& size, int num_processors) {
  const TileSizes tile = tile_sizes(product.type, many_rows);
  ProductGrid grid{};
  grid.many_rows = many_rows;
  const bool tokens = product.by_base && product.base_rows.kind == BaseRowKind::kTokens;
  grid.row_tiles = product.sorted != nullptr ? product.sorted->num_tiles
                   : tokens                  ? divide_up(product.pairs.num_tokens, tile.rows)
                                             : product.pairs.count();
  grid.output_tiles = divide_up(size.most_outputs, tile.outputs);
  grid.splits = 1;
  const int64_t busy_blocks = grid.row_tiles * divide_up(size.likely_outputs, tile.outputs);
  if (!many_rows && busy_blocks > 0) {
    const int64_t wanted = num_processors * kBlocksPerProcessor / busy_blocks;
    const int64_t possible = divide_up(size.likely_channels, tile.depth) / kStepsEach;
    grid.splits = std::clamp<int64_t>(std::min(wanted, possible), 1, kMostSplits);
  }
  if (grid.splits > 1) {
    grid.counters = grid.row_tiles * grid.output_tiles;
    grid.partial_floats = grid.counters * grid.splits * tile.rows * tile.outputs;
  }
  return grid;
}

cudaError_t launch_grouped_product(const GroupedProduct& product, const ProductGrid& grid, float* partial,
                                   int32_t* counters, cudaStream_t stream) {
  ProductArguments arguments{};
  arguments.product = product;
  arguments.product.sorted = nullptr;  // the host's own
  if (product.sorted != nullptr) {
    arguments.order = product.sorted->order;
    arguments.offsets = product.sorted->offsets;
    arguments.tiles = product.sorted->tiles;
  }
  arguments.partial = partial;
  arguments.counters = counters;
  arguments.splits = static_cast<int32_t>(grid.splits);
  const auto launch_it = product.type == ElementType::kBFloat16  ? &launch_bfloat16_product
                         : product.type == ElementType::kFloat16 ? &launch_float16_product
                                                                 : &launch_float32_product;
  return launch_it(arguments, grid, stream);
}

}  // namespace d2moe::kernels

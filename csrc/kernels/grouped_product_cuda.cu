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

ProductGrid product_grid(const GroupedProduct* products, int count, bool many_rows, int num_processors) {
  const GroupedProduct& first = products[0];
  const TileSizes tile = tile_sizes(first.type, many_rows);
  ProductGrid grid{};
  grid.many_rows = many_rows;
  const bool tokens = first.by_base && first.base_rows.kind == BaseRowKind::kTokens;
  grid.row_tiles = first.sorted != nullptr ? first.sorted->num_tiles
                   : tokens                ? divide_up(first.pairs.num_tokens, tile.rows)
                                           : first.pairs.count();
  grid.first_output_tiles = divide_up(first.size.most_outputs, tile.outputs);
  int64_t busy_blocks = 0, channels = 0;
  for (const GroupedProduct* product = products; product != products + count; ++product) {
    grid.output_tiles += divide_up(product->size.most_outputs, tile.outputs);
    busy_blocks += grid.row_tiles * divide_up(product->size.likely_outputs, tile.outputs);
    channels = std::max(channels, product->size.likely_channels);
  }
  grid.splits = 1;
  if (!many_rows && busy_blocks > 0) {
    const int64_t wanted = num_processors * kBlocksPerProcessor / busy_blocks;
    const int64_t possible = divide_up(channels, tile.depth) / kStepsEach;
    grid.splits = std::clamp<int64_t>(std::min(wanted, possible), 1, kMostSplits);
  }
  if (grid.splits > 1) {
    grid.counters = grid.row_tiles * grid.output_tiles;
    grid.partial_floats = grid.counters * grid.splits * tile.rows * tile.outputs;
  }
  return grid;
}

cudaError_t launch_grouped_products(const GroupedProduct* products, int count, const ProductGrid& grid, float* partial,
                                    int32_t* counters, cudaStream_t stream) {
  ProductArguments arguments{};
  const SortedRows* sorted = products[0].sorted;
  for (int i = 0; i < count; ++i) {
    arguments.products[i] = products[i];
    arguments.products[i].sorted = nullptr;  // the host's own
  }
  if (sorted != nullptr) {
    arguments.order = sorted->order;
    arguments.offsets = sorted->offsets;
    arguments.tiles = sorted->tiles;
  }
  arguments.partial = partial;
  arguments.counters = counters;
  arguments.splits = static_cast<int32_t>(grid.splits);
  arguments.first_output_tiles = static_cast<uint32_t>(grid.first_output_tiles);
  const auto launch_it = products[0].type == ElementType::kBFloat16  ? &launch_bfloat16_product
                         : products[0].type == ElementType::kFloat16 ? &launch_float16_product
                                                                     : &launch_float32_product;
  return launch_it(arguments, grid, stream);
}

}  // namespace d2moe::kernels

// out[row] = W[group of row] x[row] and what is added to it, for all rows of all groups at once: bases, and the factors
// of low-rank deltas, whose ranks differ. Groups are experts or bases; where rows stand is known on the device only.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/element_type.h"
#include "kernels/moe_pairs_cuda.h"
#include "kernels/row_sort_cuda.h"

namespace d2moe::kernels {

enum class WeightPart { kBase, kV, kPivotedV, kU };

// The factors of one projection's deltas, as csrc/ops/moe_forward.h describes them.
struct DeltaLists {
  const int32_t* rank;  // [num_experts], and so the next two
  const int32_t* u_start;
  const int32_t* v_start;
  int64_t in_features;
  int64_t most_rank;  // what the buffers between V and U hold
  int64_t u_rows;
  int64_t v_stored;  // rows of v, or elements where it is pivoted
  bool pivoted;
};

struct ProductWeights {
  const void* data;
  bool eight_bits;              // int8; else of the type of x
  bool by_channel;              // row j holds all outputs of channel j; else row i holds all channels of output i
  int64_t row_stride;           // elements; not of a pivoted V, whose rows follow one another
  int64_t group_stride;         // elements, between bases
  int64_t outputs;              // of a base or of U
  int64_t channels;             // of a base: as many as x has columns to multiply
  const int32_t* channel_list;  // [groups, channels]: which of the stored ones, by channel only; null for all, in order
  int64_t stored_channels;
  WeightPart part;
  DeltaLists lists;  // of a delta
};

// What becomes of a sum, in this order; null for what is not done.
struct ProductFinish {
  const void* v_scale;    // * v_scale[start + output]; start is V's, or U's where V is pivoted
  const int32_t* pivots;  // + x[pivots[U's start + output]], of whole_x
  const void* whole_x;
  int64_t whole_stride;
  int32_t whole_rows_per_x;
  const void* u_scale;      // * u_scale[U's start + output]
  const void* base_output;  // + base_output[base row of the pair, output]
  int64_t base_stride;
  const void* bias;  // + bias[expert of the pair, output]
  int64_t bias_stride;
};

// Ranks are not known on the host: a bound, which blocks are started for, and guesses, which only decide on splits.
struct ProductSize {
  int64_t most_outputs;
  int64_t likely_outputs;
  int64_t likely_channels;
};

struct GroupedProduct {
  ElementType type;  // of x and out
  MoePairs pairs;
  BaseRows base_rows;
  bool by_base;  // rows are those of base_rows, groups are bases; else rows are pairs, groups are experts
  // null if rows are not sorted: then a tile is one row, or a run of tokens where rows are tokens.
  const SortedRows* sorted;
  const void* x;
  int64_t x_stride;
  int32_t rows_per_x;  // row r multiplies row r / rows_per_x of x
  ProductWeights weights;
  ProductFinish finish;
  void* out;
  int64_t out_stride;
  ProductSize size;
};

// Up to two products of the same rows and the same form of weights run at once, as gate's and up's factors do.
constexpr int kMostProducts = 2;

// How products are cut; the same numbers size their workspace.
struct ProductGrid {
  bool many_rows;  // tiles of many rows, for products that arithmetic bounds; else of few, which memory bounds
  int64_t row_tiles;
  int64_t first_output_tiles;  // of the first product
  int64_t output_tiles;        // of all
  int64_t splits;              // of the channels: parts that are summed up at the end, in order
  int64_t partial_floats;
  int64_t counters;
};

// Rows of a tile; rows must be sorted by tiles of as many.
int product_tile_rows(ElementType type, bool many_rows);

ProductGrid product_grid(const GroupedProduct* products, int count, bool many_rows, int num_processors);

// partial [partial_floats]; counters [counters], 0 before and after.
cudaError_t launch_grouped_products(const GroupedProduct* products, int count, const ProductGrid& grid, float* partial,
                                    int32_t* counters, cudaStream_t stream);

}  // namespace d2moe::kernels

// What happens to rows between the products of moe_forward on a GPU. Rows of pairs whose id is no expert are neither
// read nor written, unless a function says so.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/element_type.h"
#include "kernels/gated_activation.h"
#include "kernels/grouped_product_cuda.h"
#include "kernels/moe_pairs_cuda.h"

namespace d2moe::kernels {

// out[pair] = 0 for pairs without an expert, or whose expert has no base.
cudaError_t launch_clear_pairs(ElementType type, const MoePairs& pairs, const BaseRows& base_rows, void* out,
                               int64_t width, cudaStream_t stream);

// out[row, j] = x[row / rows_per_x, columns[base, selected[base, j]]] for the rows of base_rows.
struct BaseColumns {
  ElementType type;
  MoePairs pairs;
  BaseRows base_rows;
  const void* x;
  int64_t x_stride;
  int32_t rows_per_x;
  int64_t in_features;
  const int32_t* columns;   // [num_bases, kept]; null for all, in order
  const int32_t* selected;  // [num_bases, keep] into columns; null for all, in order
  int64_t kept, keep;
  bool masked;  // out[row, selected[base, j]] instead, [kept] wide, and 0 elsewhere
  void* out;
  int64_t out_stride;
};
cudaError_t launch_base_columns(const BaseColumns& arguments, cudaStream_t stream);

// rest[pair] = x without the columns of the expert's pivots, in order: what a pivoted V multiplies.
struct RestOfPivots {
  ElementType type;
  MoePairs pairs;
  const void* x;
  int64_t x_stride;
  int32_t rows_per_x;
  DeltaLists lists;
  const int32_t* pivots;
  void* rest;  // [num_pairs, in_features]
};
cudaError_t launch_rest_of_pivots(const RestOfPivots& arguments, cudaStream_t stream);

// out[i] = x[order[i] / rows_per_x], [num_rows, width], for all rows of all groups: as they are sorted.
cudaError_t launch_gather_sorted(ElementType type, const SortedRows& sorted, const void* x, int32_t rows_per_x,
                                 void* out, int64_t width, cudaStream_t stream);

// weighted[pair] = weight * act(gate) * up, or weight * act(up); rows of gate_up are [gate; up], or gate0, up0, gate1,
// ...
struct WeightedActivation {
  ElementType type;
  MoePairs pairs;
  const float* weights;  // [num_pairs]
  const void* gate_up;   // [num_pairs, 2 * width], or [num_pairs, width] if not gated
  void* weighted;        // [num_pairs, width]
  int64_t width;
  Activation activation;
  bool gated, interleaved;
  // Whether a pair whose expert has no base of these has no row in gate_up: it then counts as zeros.
  bool needs_base;
  BaseRows base_rows;
  // [num_pairs]: rows of gate_up that pairs are read from, and of weighted that they go to; null for the pair's own.
  const int32_t* read_position;
  const int32_t* write_position;
};
cudaError_t launch_weighted_activation(const WeightedActivation& arguments, cudaStream_t stream);

// weighted[pair] = weight * rows[pair]
cudaError_t launch_weighted_rows(ElementType type, const MoePairs& pairs, const float* weights, const void* rows,
                                 void* weighted, int64_t width, cudaStream_t stream);

// sums[base row] = sum of the rows of its token's pairs with the same base; not for rows that are pairs.
cudaError_t launch_base_sums(ElementType type, const MoePairs& pairs, const BaseRows& base_rows, const void* rows,
                             void* sums, int64_t width, cudaStream_t stream);

// output[token] = sum over its pairs of delta_output[pair] + weight * bias[expert], and over its base rows of
// base_output[row]; 0 for a token without experts.
struct CombineTokens {
  ElementType type;
  MoePairs pairs;
  BaseRows base_rows;
  const float* weights;
  const void* base_output;   // [rows of base_rows, width]
  const void* delta_output;  // [num_pairs, width] or null
  const void* bias;          // [num_experts, width] or null
  void* output;              // [num_tokens, width]
  int64_t width;
  const int32_t* base_position;  // rows of base_output that base rows stand in, or null for their own
};
cudaError_t launch_combine_tokens(const CombineTokens& arguments, cudaStream_t stream);

}  // namespace d2moe::kernels

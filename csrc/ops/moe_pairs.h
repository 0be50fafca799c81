// The products of every (token, expert) pair, without weights.
#pragma once

#include <functional>

#include "ops/moe_products.h"

namespace d2moe {

// What pairs multiply: row p of `rows` if `row_per_pair` (the routing must have one_row_per_pair), else row p / top_k.
struct PairSource {
  Rows rows;
  int64_t width;
  bool row_per_pair;
};

// How a block's outputs begin to end are rows of the matrices: as they are; rows j and half + j (gate; up); or rows 2 j
// and 2 j + 1. Sums then hold those of the first half and of the second; or they alternate.
enum class OutputOrder { kPlain, kHalves, kAlternating };

// Sums [num_rows] of sorted pairs `first` on, for outputs begin to end. finish() may overwrite them.
struct PairSums {
  int64_t first, num_rows;
  int64_t begin, end;
  float* const* sums;
};
using FinishPairs = std::function<void(const PairSums&)>;

void multiply_pairs(const PairSource& source, const kernels::MoeRouting& routing, const BaseGroup& group,
                    at::ArrayRef<Delta> deltas, OutputOrder order, const FinishPairs& finish);

}  // namespace d2moe

// Experts and bases of pairs, on the GPU; a base that does not exist counts as none.
#pragma once

#include <cuda_runtime.h>

#include "kernels/moe_pairs_cuda.h"

namespace d2moe::kernels {

// Rows and pairs number less than 2^31, and a GPU divides 64 bits in a subroutine.
__device__ inline int32_t divide_row(int64_t row, int32_t by) {
  return static_cast<int32_t>(static_cast<uint32_t>(row) / static_cast<uint32_t>(by));
}

// -1 where the id is no expert.
__device__ inline int expert_of(const MoePairs& pairs, int64_t pair) {
  const int64_t id = pairs.wide_index ? static_cast<const int64_t*>(pairs.top_k_index)[pair]
                                      : static_cast<const int32_t*>(pairs.top_k_index)[pair];
  return 0 <= id && id < pairs.num_experts ? static_cast<int>(id) : -1;
}

__device__ inline int base_of(const MoePairs& pairs, const BaseRows& rows, int64_t pair) {
  const int expert = expert_of(pairs, pair);
  if (expert < 0) {
    return -1;
  }
  const int base = rows.expert_to_base[expert];
  return 0 <= base && base < rows.num_bases ? base : -1;
}

// The first pair of the same token with the same base, which must be one: the row that the base multiplies for `pair`.
__device__ inline int64_t base_row_of(const MoePairs& pairs, const BaseRows& rows, int64_t pair) {
  if (rows.kind == BaseRowKind::kPairs) {
    return pair;
  }
  const int64_t token = divide_row(pair, pairs.top_k);
  if (rows.kind == BaseRowKind::kTokens) {
    return token;
  }
  const int base = base_of(pairs, rows, pair);
  int64_t row = token * pairs.top_k;
  while (row < pair && base_of(pairs, rows, row) != base) {
    ++row;
  }
  return row;
}

// The base that multiplies this row, or -1 where none does.
__device__ inline int base_of_row(const MoePairs& pairs, const BaseRows& rows, int64_t row) {
  if (rows.kind == BaseRowKind::kTokens) {
    int base = -1;
    for (int slot = 0; slot < pairs.top_k && base < 0; ++slot) {
      base = base_of(pairs, rows, row * pairs.top_k + slot);
    }
    return base;
  }
  const int base = base_of(pairs, rows, row);
  return base >= 0 && base_row_of(pairs, rows, row) == row ? base : -1;
}

}  // namespace d2moe::kernels

// The rank of an expert's delta, on the GPU.
#pragma once

#include <cuda_runtime.h>

#include "kernels/grouped_product_cuda.h"

namespace d2moe::kernels {

// 0 where any of an expert's indices is out of range: they are not checked on the host.
__device__ inline int64_t rank_of(const DeltaLists& lists, int expert) {
  const int64_t rank = lists.rank[expert], u = lists.u_start[expert], v = lists.v_start[expert];
  const int64_t stored = lists.pivoted ? rank * (lists.in_features - rank) : rank;
  const bool exists = 0 < rank && rank <= lists.most_rank && rank <= lists.in_features && 0 <= u &&
                      u + rank <= lists.u_rows && 0 <= v && v + stored <= lists.v_stored;
  return exists ? rank : 0;
}

}  // namespace d2moe::kernels

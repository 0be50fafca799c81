// Rows in order of their group: what routing is on a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/moe_pairs_cuda.h"

namespace d2moe::kernels {

// Rows by group, stable, and the tiles of rows that a product works on. On the device.
struct SortedRows {
  int32_t* order;     // [num_rows]: rows of group 0, then of group 1, ...; rows of no group are left out
  int32_t* offsets;   // [num_groups + 1]
  int32_t* position;  // [num_rows], or null: each row's place in `order`, -1 where it is left out
  int2* tiles;        // [num_tiles]: a group and where in `order` a tile of it begins; group -1 after the last
  int32_t tile_rows;  // rows of a tile, but for a group's last
  int32_t num_tiles;  // as many as there can be: most_tiles()
  int32_t num_groups;
  int64_t num_rows;
};

// Tiles of rows that num_groups groups need at most.
int64_t most_tiles(int64_t num_rows, int64_t num_groups, int64_t tile_rows);

constexpr int kMostRowGroups = 8192;

struct RowSort {
  SortedRows sorted;
  bool by_base;  // rows are those of `base_rows`, groups are bases; else rows are pairs, groups are experts
  BaseRows base_rows;
};

constexpr int kMostRowSorts = 3;

// All in one launch, a block each.
cudaError_t launch_row_sorts(const MoePairs& pairs, const RowSort* sorts, int count, cudaStream_t stream);

}  // namespace d2moe::kernels

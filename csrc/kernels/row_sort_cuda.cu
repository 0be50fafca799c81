// Rows in order of their group, stable: a counting sort in one block.
//
// Each of some warps takes a run of rows: it counts its rows of every group, and once all counts are summed up, puts
// them in their places. Lanes whose rows have the same group count, and take places, at once.
#include "kernels/device_warp.cuh"
#include "kernels/launch.cuh"
#include "kernels/moe_pairs.cuh"
#include "kernels/row_sort_cuda.h"

namespace d2moe::kernels {

namespace {

constexpr int kThreads = 1024;

struct RowSorts {
  RowSort jobs[kMostRowSorts];
};

__device__ inline int group_of(const MoePairs& pairs, const RowSort& job, int64_t row) {
  if (row >= job.sorted.num_rows) {
    return -1;
  }
  return job.by_base ? base_of_row(pairs, job.base_rows, row) : expert_of(pairs, row);
}

// Calls visit(row, group, mask) for a warp's rows, 32 at a time: `mask` are the lanes with the same group.
template <typename Visit>
__device__ inline void visit_rows(const MoePairs& pairs, const RowSort& job, int warp, int num_warps, Visit visit) {
  const int64_t blocks = (job.sorted.num_rows + kLanes - 1) / kLanes;
  const int64_t each = (blocks + num_warps - 1) / num_warps;
  const int64_t end = min((warp + 1) * each, blocks);
  for (int64_t block = warp * each; block < end; ++block) {
    const int64_t row = block * kLanes + threadIdx.x % kLanes;
    const int group = group_of(pairs, job, row);
    visit(row, group, __match_any_sync(kAllLanes, group));
    __syncwarp();
  }
}

// By the first warp: offsets [groups + 1] and first_tile [groups + 1] from the counts in offsets [groups].
__device__ inline void sum_up(int* offsets, int* first_tile, int num_groups, int tile_rows) {
  int rows = 0, tiles = 0;
  for (int start = 0; start < num_groups; start += kLanes) {
    const int group = start + static_cast<int>(threadIdx.x);
    const int count = group < num_groups ? offsets[group] : 0, own_tiles = (count + tile_rows - 1) / tile_rows;
    const int rows_before = rows + lanes_below(count), tiles_before = tiles + lanes_below(own_tiles);
    if (group < num_groups) {
      offsets[group] = rows_before;
      first_tile[group] = tiles_before;
    }
    rows = __shfl_sync(kAllLanes, rows_before + count, kLanes - 1);
    tiles = __shfl_sync(kAllLanes, tiles_before + own_tiles, kLanes - 1);
  }
  if (threadIdx.x == 0) {
    offsets[num_groups] = rows;
    first_tile[num_groups] = tiles;
  }
}

__device__ inline void write_tables(const SortedRows& sorted, const int* offsets, const int* first_tile) {
  for (int group = threadIdx.x; group <= sorted.num_groups; group += kThreads) {
    sorted.offsets[group] = offsets[group];
  }
  for (int group = threadIdx.x; group < sorted.num_groups; group += kThreads) {
    for (int tile = first_tile[group]; tile < first_tile[group + 1]; ++tile) {
      sorted.tiles[tile] = make_int2(group, offsets[group] + (tile - first_tile[group]) * sorted.tile_rows);
    }
  }
  for (int tile = first_tile[sorted.num_groups] + threadIdx.x; tile < sorted.num_tiles; tile += kThreads) {
    sorted.tiles[tile] = make_int2(-1, 0);
  }
}

__global__ void __launch_bounds__(kThreads, 1) sort_rows(MoePairs pairs, RowSorts sorts, int num_warps) {
  const RowSort& job = sorts.jobs[blockIdx.x];
  const SortedRows& sorted = job.sorted;
  const int groups = sorted.num_groups, warp = static_cast<int>(threadIdx.x) / kLanes;
  int* offsets = reinterpret_cast<int*>(dynamic_shared());
  int* first_tile = offsets + groups + 1;
  int* counts = first_tile + groups + 1;  // [num_warps, groups]; then where the warp's next row of a group goes
  for (int i = threadIdx.x; i < num_warps * groups; i += kThreads) {
    counts[i] = 0;
  }
  __syncthreads();
  int* own = counts + static_cast<int64_t>(warp) * groups;
  const unsigned int lower_lanes = (1u << (threadIdx.x % kLanes)) - 1;
  if (warp < num_warps) {
    visit_rows(pairs, job, warp, num_warps, [&](int64_t, int group, unsigned int same) {
      if (group >= 0 && (same & lower_lanes) == 0) {
        own[group] += __popc(same);
      }
    });
  }
  __syncthreads();
  for (int group = threadIdx.x; group < groups; group += kThreads) {
    int total = 0;
    for (int w = 0; w < num_warps; ++w) {
      total += counts[w * groups + group];
    }
    offsets[group] = total;
  }
  __syncthreads();
  if (warp == 0) {
    sum_up(offsets, first_tile, groups, sorted.tile_rows);
  }
  __syncthreads();
  for (int group = threadIdx.x; group < groups; group += kThreads) {
    int next = offsets[group];
    for (int w = 0; w < num_warps; ++w) {
      const int count = counts[w * groups + group];
      counts[w * groups + group] = next;
      next += count;
    }
  }
  __syncthreads();
  if (warp < num_warps) {
    visit_rows(pairs, job, warp, num_warps, [&](int64_t row, int group, unsigned int same) {
      const int place = group >= 0 ? own[group] + __popc(same & lower_lanes) : -1;
      if (group >= 0) {
        sorted.order[place] = static_cast<int32_t>(row);
      }
      if (sorted.position != nullptr && row < sorted.num_rows) {
        sorted.position[row] = place;
      }
      __syncwarp();
      if (group >= 0 && (same & lower_lanes) == 0) {
        own[group] += __popc(same);
      }
    });
  }
  write_tables(sorted, offsets, first_tile);
}

}  // namespace

int64_t most_tiles(int64_t num_rows, int64_t num_groups, int64_t tile_rows) {
  // Every group may end in a tile that is not full.
  const int64_t reached = num_groups < num_rows ? num_groups : num_rows;
  return reached + (num_rows - reached) / tile_rows;
}

cudaError_t launch_row_sorts(const MoePairs& pairs, const RowSort* sorts, int count, cudaStream_t stream) {
  RowSorts jobs{};
  int64_t most_groups = 1;
  for (int i = 0; i < count; ++i) {
    jobs.jobs[i] = sorts[i];
    most_groups = sorts[i].sorted.num_groups > most_groups ? sorts[i].sorted.num_groups : most_groups;
  }
  // Fewer warps where their counts would not fit into 48 KiB with the two tables.
  constexpr int64_t kCounts = 48 * 1024 / sizeof(int);
  const int64_t fitting = kCounts / (most_groups + 1) - 2;
  const int64_t num_warps = fitting < 1 ? 1 : fitting < kThreads / kLanes ? fitting : kThreads / kLanes;
  const size_t shared = sizeof(int) * (2 * (most_groups + 1) + num_warps * most_groups);
  return launch(&sort_rows, dim3(count), dim3(kThreads), shared, stream, pairs, jobs, static_cast<int>(num_warps));
}

}  // namespace d2moe::kernels

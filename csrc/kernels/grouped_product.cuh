// The kernel of grouped products. A block takes a tile of a group's rows, kOutputs outputs and, where channels are
// split, a part of the channels; tiles of x and of the weights come through shared memory, kStages - 1 of them on their
// way.
#pragma once

#include "kernels/delta_lists.cuh"
#include "kernels/grouped_product_cuda.h"
#include "kernels/launch.cuh"
#include "kernels/moe_pairs.cuh"
#include "kernels/product_tiles.cuh"

namespace d2moe::kernels {

// GroupedProducts, with the pointers of their sorted rows: what a kernel is given.
struct ProductArguments {
  GroupedProduct products[kMostProducts];
  uint32_t first_output_tiles;  // blockIdx.y of the second product's first block
  const int32_t* order;
  const int32_t* offsets;
  const int2* tiles;
  float* partial;
  int32_t* counters;
  int32_t splits;
};

// The weights of one group.
template <typename Stored>
struct GroupWeights {
  const Stored* data;
  int64_t row_stride;
  int64_t outputs, channels;
  const int32_t* channel_list;
  int64_t u_start, scale_start;
};

template <typename Stored>
__device__ inline GroupWeights<Stored> weights_of(const ProductWeights& weights, int group) {
  const auto* data = static_cast<const Stored*>(weights.data);
  if (weights.part == WeightPart::kBase) {
    const int32_t* list = weights.channel_list == nullptr ? nullptr : weights.channel_list + group * weights.channels;
    return {data + group * weights.group_stride, weights.row_stride, weights.outputs, weights.channels, list, 0, 0};
  }
  const DeltaLists& lists = weights.lists;
  const int64_t rank = rank_of(lists, group);
  if (rank == 0) {
    return {data, 0, weights.part == WeightPart::kU ? weights.outputs : 0, 0, nullptr, 0, 0};
  }
  const int64_t u_start = lists.u_start[group], v_start = lists.v_start[group];
  switch (weights.part) {
    case WeightPart::kV:
      return {
          data + v_start * weights.row_stride, weights.row_stride, rank, lists.in_features, nullptr, u_start, v_start};
    case WeightPart::kPivotedV:
      return {data + v_start, lists.in_features - rank, rank, lists.in_features - rank, nullptr, u_start, u_start};
    default:
      return {
          data + u_start * weights.row_stride, weights.row_stride, weights.outputs, rank, nullptr, u_start, u_start};
  }
}

// What a block knows of its rows; -1 for what a row does not have.
template <int kRows>
struct RowTable {
  int32_t row[kRows];
  int32_t x_row[kRows];
  int32_t base_row[kRows];
  int32_t expert[kRows];
  int32_t group;
  int32_t last;  // whether this block sums the parts up
};

template <int kRows>
__device__ inline void fill_rows(const ProductArguments& arguments, const GroupedProduct& product,
                                 RowTable<kRows>& table) {
  const MoePairs& pairs = product.pairs;
  const int64_t tile = blockIdx.x, m = threadIdx.x;
  const bool tokens = product.by_base && product.base_rows.kind == BaseRowKind::kTokens;
  int group = 0;
  int64_t row = -1;
  if (arguments.tiles != nullptr) {
    const int2 start = arguments.tiles[tile];
    group = start.x;
    if (group >= 0 && m < kRows && start.y + m < arguments.offsets[group + 1]) {
      row = arguments.order[start.y + m];
    }
  } else if (tokens) {
    row = tile * kRows + m < pairs.num_tokens ? tile * kRows + m : -1;
  } else {
    group = product.by_base ? base_of_row(pairs, product.base_rows, tile) : expert_of(pairs, tile);
    row = m == 0 && group >= 0 ? tile : -1;
  }
  if (m == 0) {
    table.group = group;
  }
  if (m < kRows) {
    const bool is_pair = row >= 0 && !tokens;
    const bool has_base =
        is_pair && product.finish.base_output != nullptr && base_of(pairs, product.base_rows, row) >= 0;
    table.row[m] = static_cast<int32_t>(row);
    table.x_row[m] = row < 0 ? -1 : divide_row(row, product.rows_per_x);
    table.base_row[m] = has_base ? static_cast<int32_t>(base_row_of(pairs, product.base_rows, row)) : -1;
    table.expert[m] = is_pair ? expert_of(pairs, row) : -1;
  }
  __syncthreads();
}

// 16 bytes of a row, of which `available` elements exist: zeros for the rest.
template <typename Stored>
__device__ inline void load_chunk(Stored* shared, const Stored* global, int64_t available) {
  constexpr int kChunk = 16 / static_cast<int>(sizeof(Stored));
  if (available >= kChunk && reinterpret_cast<uintptr_t>(global) % 16 == 0) {
    copy_16_bytes_later(shared, global);
    return;
  }
  if (available <= 0) {
    *reinterpret_cast<uint4*>(shared) = make_uint4(0, 0, 0, 0);
    return;
  }
#pragma unroll 1  // the way of a row's end
  for (int e = 0; e < kChunk; ++e) {
    shared[e] = e < available ? global[e] : Stored{};
  }
}

template <typename Tile, typename Stored, bool kByChannel>
struct alignas(16) Stage {
  using Element = typename Tile::Element;
  static constexpr int kXStride = Tile::kDepth + kPadding<Element>;
  static constexpr int kWeightRows = kByChannel ? Tile::kDepth : Tile::kOutputs;
  static constexpr int kWeightColumns = kByChannel ? Tile::kOutputs : Tile::kDepth;
  static constexpr int kWeightStride = kWeightColumns + kPadding<Stored>;

  Element x[Tile::kRows * kXStride];
  Stored weights[kWeightRows * kWeightStride];
};

// Channels `first` to `end`, at most kDepth, of the block's rows of x and of its outputs' weights.
template <typename Tile, typename Stored, bool kByChannel>
__device__ inline void load_stage(const GroupedProduct& product, const RowTable<Tile::kRows>& table,
                                  const GroupWeights<Stored>& weights, int64_t first_output, int64_t first, int64_t end,
                                  Stage<Tile, Stored, kByChannel>& stage) {
  using Element = typename Tile::Element;
  using TileStage = Stage<Tile, Stored, kByChannel>;
  constexpr int kChunk = 16 / static_cast<int>(sizeof(Element)), kChunks = Tile::kDepth / kChunk;
  const auto* x = static_cast<const Element*>(product.x);
  for (int i = threadIdx.x; i < Tile::kRows * kChunks; i += Tile::kThreads) {
    const int m = i / kChunks, column = i % kChunks * kChunk;
    const int64_t x_row = table.x_row[m], channel = first + column;
    load_chunk(stage.x + m * TileStage::kXStride + column, x + (x_row < 0 ? 0 : x_row * product.x_stride + channel),
               x_row < 0 ? 0 : end - channel);
  }
  constexpr int kStoredChunk = 16 / static_cast<int>(sizeof(Stored));
  constexpr int kStoredChunks = TileStage::kWeightColumns / kStoredChunk;
  for (int i = threadIdx.x; i < TileStage::kWeightRows * kStoredChunks; i += Tile::kThreads) {
    const int r = i / kStoredChunks, column = i % kStoredChunks * kStoredChunk;
    int64_t row, available;
    if constexpr (kByChannel) {
      row = first + r < end && weights.channel_list != nullptr ? weights.channel_list[first + r] : first + r;
      const bool exists =
          first + r < end && 0 <= row && (weights.channel_list == nullptr || row < product.weights.stored_channels);
      available = exists ? weights.outputs - (first_output + column) : 0;
    } else {
      row = first_output + r;
      available = row < weights.outputs ? end - (first + column) : 0;
    }
    const int64_t offset = row * weights.row_stride + (kByChannel ? first_output : first) + column;
    load_chunk(stage.weights + r * TileStage::kWeightStride + column, weights.data + (available > 0 ? offset : 0),
               available);
  }
}

template <typename Element, int kRows>
__device__ inline void finish_and_store(const GroupedProduct& product, const RowTable<kRows>& table, int64_t u_start,
                                        int64_t scale_start, int m, int64_t output, float value) {
  const ProductFinish& finish = product.finish;
  const auto at = [](const void* data, int64_t i) { return widen(static_cast<const Element*>(data)[i]); };
  if (finish.v_scale != nullptr) {
    value *= at(finish.v_scale, scale_start + output);
  }
  if (finish.pivots != nullptr) {
    const int64_t column = finish.pivots[u_start + output];
    const bool exists = 0 <= column && column < product.weights.lists.in_features;
    value += exists
                 ? at(finish.whole_x, divide_row(table.row[m], finish.whole_rows_per_x) * finish.whole_stride + column)
                 : 0.0f;
  }
  if (finish.u_scale != nullptr) {
    value *= at(finish.u_scale, u_start + output);
  }
  if (table.base_row[m] >= 0) {
    value += at(finish.base_output, table.base_row[m] * finish.base_stride + output);
  }
  if (finish.bias != nullptr && table.expert[m] >= 0) {
    value += at(finish.bias, table.expert[m] * finish.bias_stride + output);
  }
  static_cast<Element*>(product.out)[table.row[m] * product.out_stride + output] = narrow<Element>(value);
}

// Weights of eight bits, as they are stored, become elements; elements need nothing.
template <typename Tile, typename Stored, bool kByChannel>
__device__ inline const typename Tile::Element* widened(const Stage<Tile, Stored, kByChannel>& stage,
                                                        typename Tile::Element* wide) {
  using Element = typename Tile::Element;
  using TileStage = Stage<Tile, Stored, kByChannel>;
  if constexpr (std::is_same_v<Stored, Element>) {
    return stage.weights;
  } else {
    constexpr int kWideStride = TileStage::kWeightColumns + kPadding<Element>;
    for (int i = threadIdx.x; i < TileStage::kWeightRows * TileStage::kWeightColumns; i += Tile::kThreads) {
      const int r = i / TileStage::kWeightColumns, column = i % TileStage::kWeightColumns;
      wide[r * kWideStride + column] =
          narrow<Element>(static_cast<float>(stage.weights[r * TileStage::kWeightStride + column]));
    }
    __syncthreads();
    return wide;
  }
}

template <typename Tile, typename Stored, bool kByChannel>
struct SharedProduct {
  RowTable<Tile::kRows> table;
  alignas(16) Stage<Tile, Stored, kByChannel> stages[Tile::kStages];
  using Element = typename Tile::Element;
  using TileStage = Stage<Tile, Stored, kByChannel>;
  static constexpr int kWide =
      std::is_same_v<Stored, Element> ? 1 : TileStage::kWeightRows * (TileStage::kWeightColumns + kPadding<Element>);
  alignas(16) Element wide[kWide];
};

// Leaves the parts' sum in `tile` of the block that is last to write one; false in the others.
template <typename Tile>
__device__ inline bool sum_parts(const ProductArguments& arguments, Tile& tile, int32_t& last) {
  constexpr int64_t kTile = Tile::kRows * Tile::kOutputs;
  const int64_t place = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  float* parts = arguments.partial + place * arguments.splits * kTile;
  tile.visit([&](int m, int n, float& sum) { parts[blockIdx.z * kTile + m * Tile::kOutputs + n] = sum; });
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(arguments.counters + place, 1) == arguments.splits - 1 ? 1 : 0;
    if (last != 0) {
      arguments.counters[place] = 0;
    }
  }
  __syncthreads();
  if (last == 0) {
    return false;
  }
  __threadfence();
  tile.visit([&](int m, int n, float& sum) {
    sum = 0.0f;
    for (int split = 0; split < arguments.splits; ++split) {
      sum += __ldcg(parts + split * kTile + m * Tile::kOutputs + n);
    }
  });
  return true;
}

template <typename Tile, typename Stored, bool kByChannel>
__global__ void __launch_bounds__(Tile::kThreads) grouped_product(const __grid_constant__ ProductArguments arguments) {
  using Element = typename Tile::Element;
  auto& shared = *reinterpret_cast<SharedProduct<Tile, Stored, kByChannel>*>(dynamic_shared());
  const bool second = blockIdx.y >= arguments.first_output_tiles;
  const GroupedProduct& product = arguments.products[second ? 1 : 0];
  fill_rows(arguments, product, shared.table);
  if (shared.table.group < 0) {
    return;
  }
  const GroupWeights<Stored> weights = weights_of<Stored>(product.weights, shared.table.group);
  const uint32_t output_tile = blockIdx.y - (second ? arguments.first_output_tiles : 0);
  const int64_t first_output = static_cast<int64_t>(output_tile) * Tile::kOutputs;
  if (first_output >= weights.outputs) {
    return;
  }
  const int all_steps = static_cast<int>((weights.channels + Tile::kDepth - 1) / Tile::kDepth);
  const int steps_each = (all_steps + arguments.splits - 1) / arguments.splits;
  const int first_step = static_cast<int>(blockIdx.z) * steps_each;
  const int num_steps = max(0, min(steps_each, all_steps - first_step));
  const int64_t begin = static_cast<int64_t>(first_step) * Tile::kDepth;
  const int64_t end = min(weights.channels, begin + static_cast<int64_t>(num_steps) * Tile::kDepth);

  Tile tile;
  const auto load = [&](int step) {
    if (step < num_steps) {
      load_stage(product, shared.table, weights, first_output, begin + static_cast<int64_t>(step) * Tile::kDepth, end,
                 shared.stages[step % Tile::kStages]);
    }
    close_copies();
  };
#pragma unroll
  for (int step = 0; step < Tile::kStages - 1; ++step) {
    load(step);
  }
  for (int step = 0; step < num_steps; ++step) {
    wait_copies<Tile::kStages - 2>();
    __syncthreads();  // everybody's copies are there, and nobody reads the stage that is loaded next
    load(step + Tile::kStages - 1);
    const auto& stage = shared.stages[step % Tile::kStages];
    tile.template multiply<kByChannel>(stage.x, widened(stage, shared.wide));
  }
  wait_copies<0>();
  if (arguments.splits > 1 && !sum_parts(arguments, tile, shared.table.last)) {
    return;
  }
  tile.visit([&](int m, int n, float& sum) {
    if (shared.table.row[m] >= 0 && first_output + n < weights.outputs) {
      finish_and_store<Element>(product, shared.table, weights.u_start, weights.scale_start, m, first_output + n, sum);
    }
  });
}

template <typename Tile, typename Stored, bool kByChannel>
cudaError_t launch_product(const ProductArguments& arguments, const ProductGrid& grid, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned int>(grid.row_tiles), static_cast<unsigned int>(grid.output_tiles),
                    static_cast<unsigned int>(grid.splits));
  return launch(&grouped_product<Tile, Stored, kByChannel>, blocks, dim3(Tile::kThreads),
                sizeof(SharedProduct<Tile, Stored, kByChannel>), stream, arguments);
}

// The kernel for these weights.
template <typename Tile>
cudaError_t launch_product_with(const ProductArguments& arguments, const ProductGrid& grid, cudaStream_t stream) {
  using Element = typename Tile::Element;
  const ProductWeights& weights = arguments.products[0].weights;
  const auto kernel =
      weights.eight_bits
          ? (weights.by_channel ? &launch_product<Tile, int8_t, true> : &launch_product<Tile, int8_t, false>)
          : (weights.by_channel ? &launch_product<Tile, Element, true> : &launch_product<Tile, Element, false>);
  return kernel(arguments, grid, stream);
}

template <typename Element>
using FewRows = TensorTile<Element, 16, 1, 4, 64, 4>;
template <typename Element>
using ManyRows = TensorTile<Element, 128, 2, 4, 32, 4>;
using FewFloatRows = ScalarTile<16, 4, 32, 3>;
using ManyFloatRows = ScalarTile<64, 8, 32, 3>;

// In a file for each type, so that they compile side by side.
cudaError_t launch_bfloat16_product(const ProductArguments& arguments, const ProductGrid& grid, cudaStream_t stream);
cudaError_t launch_float16_product(const ProductArguments& arguments, const ProductGrid& grid, cudaStream_t stream);
cudaError_t launch_float32_product(const ProductArguments& arguments, const ProductGrid& grid, cudaStream_t stream);

}  // namespace d2moe::kernels

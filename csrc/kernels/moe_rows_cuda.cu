// A block takes a row, or a strip of one where it is wide: kPack neighbouring elements a thread.
#include <type_traits>

#include "kernels/delta_lists.cuh"
#include "kernels/device_elements.cuh"
#include "kernels/device_warp.cuh"
#include "kernels/launch.cuh"
#include "kernels/moe_pairs.cuh"
#include "kernels/moe_rows_cuda.h"

namespace d2moe::kernels {

namespace {

constexpr int kThreads = 256;

// The strip's first column for this thread; the strips of a row are blockIdx.y.
template <int kPack>
__device__ inline int64_t first_column() {
  return (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kPack;
}

dim3 strips(int64_t rows, int64_t width, int pack) {
  const int64_t each = static_cast<int64_t>(kThreads) * pack;
  return dim3(static_cast<unsigned int>(rows), static_cast<unsigned int>((width + each - 1) / each));
}

template <typename Element, int kPack>
__device__ inline Pack<Element, kPack> load(const void* data, int64_t offset) {
  return *reinterpret_cast<const Pack<Element, kPack>*>(static_cast<const Element*>(data) + offset);
}

template <typename Element, int kPack>
__device__ inline void store(void* data, int64_t offset, const float (&values)[kPack]) {
  Pack<Element, kPack> pack;
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    pack.values[e] = narrow<Element>(values[e]);
  }
  *reinterpret_cast<Pack<Element, kPack>*>(static_cast<Element*>(data) + offset) = pack;
}

template <typename Element, int kPack>
__device__ inline void add(float (&sums)[kPack], const void* data, int64_t offset, float weight) {
  const Pack<Element, kPack> pack = load<Element, kPack>(data, offset);
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    sums[e] += weight * widen(pack.values[e]);
  }
}

// Calls launch_with(element, pack) with an element's type and how many of them a thread takes: 16 bytes where all rows
// begin at multiples of that.
template <typename LaunchWith>
cudaError_t visit_packs(ElementType type, int64_t width, std::initializer_list<const void*> pointers,
                        LaunchWith&& launch_with) {
  cudaError_t status = cudaSuccess;
  visit_device_elements(nullptr, type, [&](const auto* none) {
    using Element = std::decay_t<decltype(*none)>;
    if constexpr (!std::is_same_v<Element, double>) {
      constexpr int kPack = 16 / sizeof(Element);
      bool packs = width % kPack == 0;
      for (const void* pointer : pointers) {
        packs = packs && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
      }
      status = packs ? launch_with(Element{}, std::integral_constant<int, kPack>())
                     : launch_with(Element{}, std::integral_constant<int, 1>());
    }
  });
  return status;
}

template <typename Element, int kPack>
__global__ void __launch_bounds__(kThreads) clear_pairs(MoePairs pairs, BaseRows base_rows, void* out, int64_t width) {
  const int64_t pair = blockIdx.x, j = first_column<kPack>();
  if (j < width && base_of(pairs, base_rows, pair) < 0) {
    const float zeros[kPack] = {};
    store<Element, kPack>(out, pair * width + j, zeros);
  }
}

template <typename Element>
__global__ void __launch_bounds__(kThreads) base_columns(BaseColumns a) {
  const int64_t row = blockIdx.x;
  const int base = base_of_row(a.pairs, a.base_rows, row);
  if (base < 0) {
    return;
  }
  const auto* x = static_cast<const Element*>(a.x) + divide_row(row, a.rows_per_x) * a.x_stride;
  auto* out = static_cast<Element*>(a.out) + row * a.out_stride;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.y) * kThreads;
  if (a.masked) {
    for (int64_t j = first; j < a.kept; j += step) {
      out[j] = narrow<Element>(0.0f);
    }
    __syncthreads();  // a masked row is one block's
  }
  for (int64_t j = first; j < a.keep; j += step) {
    const int64_t place = a.selected == nullptr ? j : a.selected[base * a.keep + j];
    const bool stored = 0 <= place && place < a.kept;
    const int64_t column = !stored ? -1 : a.columns == nullptr ? place : a.columns[base * a.kept + place];
    const Element value = 0 <= column && column < a.in_features ? x[column] : narrow<Element>(0.0f);
    if (!a.masked) {
      out[j] = value;
    } else if (stored) {
      out[place] = value;
    }
  }
}

// Compacts kThreads columns at a time: a column's place is how many of the rest come before it.
template <typename Element>
__global__ void __launch_bounds__(kThreads) rest_of_pivots(RestOfPivots a) {
  __shared__ int warp_counts[kThreads / kLanes];
  unsigned char* is_pivot = dynamic_shared();  // [in_features]
  const int64_t pair = blockIdx.x, in = a.lists.in_features;
  const int expert = expert_of(a.pairs, pair);
  if (expert < 0) {
    return;
  }
  const int64_t rank = rank_of(a.lists, expert);
  for (int64_t j = threadIdx.x; j < in; j += kThreads) {
    is_pivot[j] = 0;
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < rank; i += kThreads) {
    const int64_t column = a.pivots[a.lists.u_start[expert] + i];
    if (0 <= column && column < in) {
      is_pivot[column] = 1;
    }
  }
  __syncthreads();
  const auto* x = static_cast<const Element*>(a.x) + divide_row(pair, a.rows_per_x) * a.x_stride;
  auto* rest = static_cast<Element*>(a.rest) + pair * in;
  const int warp = static_cast<int>(threadIdx.x) / kLanes, lane = static_cast<int>(threadIdx.x) % kLanes;
  int64_t written = 0;
  for (int64_t start = 0; start < in; start += kThreads) {
    const int64_t j = start + threadIdx.x;
    const bool kept = j < in && is_pivot[j] == 0;
    const unsigned int mask = __ballot_sync(kAllLanes, kept ? 1 : 0);
    if (lane == 0) {
      warp_counts[warp] = __popc(mask);
    }
    __syncthreads();
    int before = 0, total = 0;
    for (int w = 0; w < kThreads / kLanes; ++w) {
      before += w < warp ? warp_counts[w] : 0;
      total += warp_counts[w];
    }
    if (kept) {
      rest[written + before + __popc(mask & ((1u << lane) - 1))] = x[j];
    }
    written += total;
    __syncthreads();
  }
}

template <typename Element, int kPack>
__global__ void __launch_bounds__(kThreads)
    gather_sorted(SortedRows sorted, const void* x, int32_t rows_per_x, void* out, int64_t width) {
  const int64_t i = blockIdx.x, j = first_column<kPack>();
  if (i < sorted.offsets[sorted.num_groups] && j < width) {
    const int64_t row = divide_row(sorted.order[i], rows_per_x);
    *reinterpret_cast<Pack<Element, kPack>*>(static_cast<Element*>(out) + i * width + j) =
        load<Element, kPack>(x, row * width + j);
  }
}

// As on the CPU (gated_activation.cpp), to float32's precision over its whole range.
__device__ inline float activate(Activation activation, float value) {
  constexpr float kSqrtHalf = 0.70710678118654752f, kSqrtTwoOverPi = 0.79788456080286536f;
  switch (activation) {
    case Activation::kSilu:
      return value / (1.0f + expf(-value));
    case Activation::kGelu:  // 1 + erf(a) would cancel
      return 0.5f * value * erfcf(-value * kSqrtHalf);
    case Activation::kGeluTanh:  // 1 + tanh(a), likewise: it is 2 / (1 + exp(-2 a))
      return value / (1.0f + expf(-2.0f * kSqrtTwoOverPi * (value + 0.044715f * value * value * value)));
    case Activation::kRelu2:
      return value > 0.0f ? value * value : value <= 0.0f ? 0.0f : value;  // NaN stays
  }
  return value;
}

template <typename Element, int kPack>
__global__ void __launch_bounds__(kThreads) weighted_activation(WeightedActivation a) {
  const int64_t pair = blockIdx.x, j = first_column<kPack>();
  if (j >= a.width || expert_of(a.pairs, pair) < 0) {
    return;
  }
  const int64_t from = a.read_position == nullptr ? pair : a.read_position[pair];
  const int64_t to = a.write_position == nullptr ? pair : a.write_position[pair];
  if (to < 0) {
    return;
  }
  const float weight = a.weights[pair];
  float values[kPack] = {};
  if (from < 0 || (a.needs_base && base_of(a.pairs, a.base_rows, pair) < 0)) {
    // Nothing wrote its row.
  } else if (!a.gated) {
    const Pack<Element, kPack> up = load<Element, kPack>(a.gate_up, from * a.width + j);
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      values[e] = weight * activate(a.activation, widen(up.values[e]));
    }
  } else if (a.interleaved) {
    const int64_t place = 2 * (from * a.width + j);
    const Pack<Element, kPack> first = load<Element, kPack>(a.gate_up, place);
    const Pack<Element, kPack> second = load<Element, kPack>(a.gate_up, place + kPack);
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      const auto at = [&](int i) { return widen(i < kPack ? first.values[i] : second.values[i - kPack]); };
      values[e] = weight * activate(a.activation, at(2 * e)) * at(2 * e + 1);
    }
  } else {
    const Pack<Element, kPack> gate = load<Element, kPack>(a.gate_up, 2 * from * a.width + j);
    const Pack<Element, kPack> up = load<Element, kPack>(a.gate_up, (2 * from + 1) * a.width + j);
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      values[e] = weight * activate(a.activation, widen(gate.values[e])) * widen(up.values[e]);
    }
  }
  store<Element, kPack>(a.weighted, to * a.width + j, values);
}

template <typename Element, int kPack>
__global__ void __launch_bounds__(kThreads)
    weighted_rows(MoePairs pairs, const float* weights, const void* rows, void* weighted, int64_t width) {
  const int64_t pair = blockIdx.x, j = first_column<kPack>();
  if (j < width && expert_of(pairs, pair) >= 0) {
    float values[kPack] = {};
    add<Element, kPack>(values, rows, pair * width + j, weights[pair]);
    store<Element, kPack>(weighted, pair * width + j, values);
  }
}

template <typename Element, int kPack>
__global__ void __launch_bounds__(kThreads)
    base_sums(MoePairs pairs, BaseRows base_rows, const void* rows, void* sums, int64_t width) {
  auto* included = reinterpret_cast<int*>(dynamic_shared());  // [top_k]
  const int64_t row = blockIdx.x, j = first_column<kPack>();
  const int64_t token = base_rows.kind == BaseRowKind::kTokens ? row : divide_row(row, pairs.top_k);
  const int64_t first = token * pairs.top_k;
  const int base = base_of_row(pairs, base_rows, row);
  if (base < 0) {
    return;
  }
  for (int slot = threadIdx.x; slot < pairs.top_k; slot += kThreads) {
    included[slot] = base_of(pairs, base_rows, first + slot) == base ? 1 : 0;
  }
  __syncthreads();
  if (j >= width) {
    return;
  }
  float values[kPack] = {};
  for (int slot = 0; slot < pairs.top_k; ++slot) {
    if (included[slot] != 0) {
      add<Element, kPack>(values, rows, (first + slot) * width + j, 1.0f);
    }
  }
  store<Element, kPack>(sums, row * width + j, values);
}

// Base rows [top_k] of a token: the row of its base's output that a slot adds, each row once; -1 for none. `bases` are
// the slots' bases.
__device__ inline void own_base_rows(BaseRowKind kind, const int* bases, int top_k, int token, int* base_row) {
  for (int slot = threadIdx.x; slot < top_k; slot += kThreads) {
    bool first = bases[slot] >= 0;
    for (int earlier = 0; kind != BaseRowKind::kPairs && earlier < slot; ++earlier) {
      first = first && bases[earlier] != bases[slot];
    }
    base_row[slot] = !first ? -1 : kind == BaseRowKind::kTokens ? token : token * top_k + slot;
  }
}

// Four blocks a multiprocessor: for more of them the compiler would spill registers.
template <typename Element, int kPack>
__global__ void __launch_bounds__(kThreads, 4) combine_tokens(CombineTokens a) {
  auto* experts = reinterpret_cast<int*>(dynamic_shared());  // [top_k], and so the next two
  auto* bases = experts + a.pairs.top_k;
  auto* base_row = bases + a.pairs.top_k;
  const int64_t token = blockIdx.x, j = first_column<kPack>(), first = token * a.pairs.top_k;
  for (int slot = threadIdx.x; slot < a.pairs.top_k; slot += kThreads) {
    experts[slot] = expert_of(a.pairs, first + slot);
    bases[slot] = base_of(a.pairs, a.base_rows, first + slot);
  }
  __syncthreads();
  own_base_rows(a.base_rows.kind, bases, a.pairs.top_k, static_cast<int>(token), base_row);
  __syncthreads();
  if (j >= a.width) {
    return;
  }
  float values[kPack] = {};
  for (int slot = 0; slot < a.pairs.top_k; ++slot) {
    const int row = base_row[slot] < 0 || a.base_position == nullptr ? base_row[slot] : a.base_position[base_row[slot]];
    if (row >= 0) {
      add<Element, kPack>(values, a.base_output, row * a.width + j, 1.0f);
    }
    if (experts[slot] >= 0 && a.delta_output != nullptr) {
      add<Element, kPack>(values, a.delta_output, (first + slot) * a.width + j, 1.0f);
    }
    if (experts[slot] >= 0 && a.bias != nullptr) {
      add<Element, kPack>(values, a.bias, experts[slot] * a.width + j, a.weights[first + slot]);
    }
  }
  store<Element, kPack>(a.output, token * a.width + j, values);
}

}  // namespace

cudaError_t launch_clear_pairs(ElementType type, const MoePairs& pairs, const BaseRows& base_rows, void* out,
                               int64_t width, cudaStream_t stream) {
  return visit_packs(type, width, {out}, [&](auto element, auto pack) {
    return launch(&clear_pairs<decltype(element), pack.value>, strips(pairs.count(), width, pack.value), dim3(kThreads),
                  0, stream, pairs, base_rows, out, width);
  });
}

cudaError_t launch_base_columns(const BaseColumns& arguments, cudaStream_t stream) {
  const int64_t rows = arguments.base_rows.count(arguments.pairs);
  return visit_packs(arguments.type, 1, {}, [&](auto element, auto) {
    using Element = decltype(element);
    const dim3 grid = arguments.masked ? dim3(static_cast<unsigned int>(rows)) : strips(rows, arguments.keep, 4);
    return launch(&base_columns<Element>, grid, dim3(kThreads), 0, stream, arguments);
  });
}

cudaError_t launch_rest_of_pivots(const RestOfPivots& arguments, cudaStream_t stream) {
  return visit_packs(arguments.type, 1, {}, [&](auto element, auto) {
    using Element = decltype(element);
    const dim3 grid(static_cast<unsigned int>(arguments.pairs.count()));
    return launch(&rest_of_pivots<Element>, grid, dim3(kThreads), arguments.lists.in_features, stream, arguments);
  });
}

cudaError_t launch_gather_sorted(ElementType type, const SortedRows& sorted, const void* x, int32_t rows_per_x,
                                 void* out, int64_t width, cudaStream_t stream) {
  return visit_packs(type, width, {x, out}, [&](auto element, auto pack) {
    return launch(&gather_sorted<decltype(element), pack.value>, strips(sorted.num_rows, width, pack.value),
                  dim3(kThreads), 0, stream, sorted, x, rows_per_x, out, width);
  });
}

cudaError_t launch_weighted_activation(const WeightedActivation& arguments, cudaStream_t stream) {
  return visit_packs(arguments.type, arguments.width, {arguments.gate_up, arguments.weighted},
                     [&](auto element, auto pack) {
                       return launch(&weighted_activation<decltype(element), pack.value>,
                                     strips(arguments.pairs.count(), arguments.width, pack.value), dim3(kThreads), 0,
                                     stream, arguments);
                     });
}

cudaError_t launch_weighted_rows(ElementType type, const MoePairs& pairs, const float* weights, const void* rows,
                                 void* weighted, int64_t width, cudaStream_t stream) {
  return visit_packs(type, width, {rows, weighted}, [&](auto element, auto pack) {
    return launch(&weighted_rows<decltype(element), pack.value>, strips(pairs.count(), width, pack.value),
                  dim3(kThreads), 0, stream, pairs, weights, rows, weighted, width);
  });
}

cudaError_t launch_base_sums(ElementType type, const MoePairs& pairs, const BaseRows& base_rows, const void* rows,
                             void* sums, int64_t width, cudaStream_t stream) {
  return visit_packs(type, width, {rows, sums}, [&](auto element, auto pack) {
    return launch(&base_sums<decltype(element), pack.value>, strips(base_rows.count(pairs), width, pack.value),
                  dim3(kThreads), sizeof(int) * pairs.top_k, stream, pairs, base_rows, rows, sums, width);
  });
}

cudaError_t launch_combine_tokens(const CombineTokens& arguments, cudaStream_t stream) {
  const std::initializer_list<const void*> pointers = {arguments.base_output, arguments.delta_output, arguments.bias,
                                                       arguments.output};
  return visit_packs(arguments.type, arguments.width, pointers, [&](auto element, auto pack) {
    return launch(&combine_tokens<decltype(element), pack.value>,
                  strips(arguments.pairs.num_tokens, arguments.width, pack.value), dim3(kThreads),
                  3 * sizeof(int) * arguments.pairs.top_k, stream, arguments);
  });
}

}  // namespace d2moe::kernels

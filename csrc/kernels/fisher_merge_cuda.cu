// F = scale * gradient^2, weighted_sum += F * weight, fisher_sum += F: one pass, eight elements a thread, 16 bytes a
// load.
#include "kernels/device_elements.cuh"
#include "kernels/fisher_merge_cuda.h"
#include "kernels/launch.cuh"

namespace d2moe::kernels {

namespace {

constexpr int kThreads = 256;
constexpr int kPack = 8;

template <typename Accumulator, typename Weight, typename Gradient>
__device__ inline void merge_element(Accumulator& weighted, Accumulator& fisher_sum, Weight weight, Gradient gradient,
                                     Accumulator scale) {
  const auto g = static_cast<Accumulator>(widen(gradient));
  const Accumulator fisher = scale * g * g;
  weighted += fisher * static_cast<Accumulator>(widen(weight));
  fisher_sum += fisher;
}

template <typename Accumulator, typename Weight, typename Gradient>
__global__ void __launch_bounds__(kThreads)
    merge_packs(Accumulator* __restrict__ weighted_sum, Accumulator* __restrict__ fisher_sum,
                const Weight* __restrict__ weight, const Gradient* __restrict__ gradient, Accumulator scale,
                int64_t num_packs) {
  auto* weighted_packs = reinterpret_cast<Pack<Accumulator, kPack>*>(weighted_sum);
  auto* fisher_packs = reinterpret_cast<Pack<Accumulator, kPack>*>(fisher_sum);
  const auto* weights = reinterpret_cast<const Pack<Weight, kPack>*>(weight);
  const auto* gradients = reinterpret_cast<const Pack<Gradient, kPack>*>(gradient);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < num_packs; i += step) {
    Pack<Accumulator, kPack> weighted = weighted_packs[i], fishers = fisher_packs[i];
    const Pack<Weight, kPack> w = weights[i];
    const Pack<Gradient, kPack> g = gradients[i];
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      merge_element(weighted.values[e], fishers.values[e], w.values[e], g.values[e], scale);
    }
    weighted_packs[i] = weighted;
    fisher_packs[i] = fishers;
  }
}

// What is left of the packs, and all of it where an address is not a multiple of 16 bytes.
template <typename Accumulator, typename Weight, typename Gradient>
__global__ void __launch_bounds__(kThreads)
    merge_singles(Accumulator* __restrict__ weighted_sum, Accumulator* __restrict__ fisher_sum,
                  const Weight* __restrict__ weight, const Gradient* __restrict__ gradient, Accumulator scale,
                  int64_t begin, int64_t end) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = begin + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < end; i += step) {
    merge_element(weighted_sum[i], fisher_sum[i], weight[i], gradient[i], scale);
  }
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename Accumulator, typename Weight, typename Gradient>
cudaError_t launch_merge(Accumulator* weighted_sum, Accumulator* fisher_sum, const Weight* weight,
                         const Gradient* gradient, Accumulator scale, int64_t count, cudaStream_t stream) {
  const bool packs = aligned(weighted_sum) && aligned(fisher_sum) && aligned(weight) && aligned(gradient);
  const int64_t num_packs = packs ? count / kPack : 0;
  cudaError_t status = cudaSuccess;
  if (num_packs > 0) {
    status = launch(&merge_packs<Accumulator, Weight, Gradient>, grid_size(num_packs, kThreads), kThreads, 0, stream,
                    weighted_sum, fisher_sum, weight, gradient, scale, num_packs);
  }
  if (status == cudaSuccess && num_packs * kPack < count) {
    status = launch(&merge_singles<Accumulator, Weight, Gradient>, grid_size(count - num_packs * kPack, kThreads),
                    kThreads, 0, stream, weighted_sum, fisher_sum, weight, gradient, scale, num_packs * kPack, count);
  }
  return status;
}

template <typename Accumulator>
cudaError_t launch_for(void* weighted_sum, void* fisher_sum, const void* weight, ElementType weight_type,
                       const void* gradient, ElementType gradient_type, double scale, int64_t count,
                       cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  visit_device_elements(weight, weight_type, [&](const auto* weights) {
    visit_device_elements(gradient, gradient_type, [&](const auto* gradients) {
      status = launch_merge(static_cast<Accumulator*>(weighted_sum), static_cast<Accumulator*>(fisher_sum), weights,
                            gradients, static_cast<Accumulator>(scale), count, stream);
    });
  });
  return status;
}

}  // namespace

cudaError_t launch_fisher_merge(void* weighted_sum, void* fisher_sum, ElementType accumulators, const void* weight,
                                ElementType weight_type, const void* gradient, ElementType gradient_type, double scale,
                                int64_t count, cudaStream_t stream) {
  if (count == 0) {
    return cudaSuccess;
  }
  const auto merge = accumulators == ElementType::kFloat64 ? &launch_for<double> : &launch_for<float>;
  return merge(weighted_sum, fisher_sum, weight, weight_type, gradient, gradient_type, scale, count, stream);
}

}  // namespace d2moe::kernels

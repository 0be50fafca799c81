// A block's tile of a product: sums [kRows, kOutputs] over kDepth channels at a time, from shared memory.
//
// Rows of shared memory are 16 bytes longer than what they hold: the eight rows of a matrix that load_matrices reads
// then begin in eight different groups of banks.
#pragma once

#include "kernels/device_mma.cuh"

namespace d2moe::kernels {

template <typename Element>
constexpr int kPadding = 16 / static_cast<int>(sizeof(Element));

// By tensor cores, for 16-bit elements: kDown x kAcross warps.
template <typename Element_, int kRows_, int kDown, int kAcross, int kDepth_, int kStages_>
struct TensorTile {
  using Element = Element_;
  static constexpr int kRows = kRows_, kOutputs = 128, kDepth = kDepth_, kStages = kStages_;
  static constexpr int kThreads = 32 * kDown * kAcross;
  static constexpr int kDownEach = kRows / kDown / 16, kAcrossEach = kOutputs / kAcross / 8;

  float sums[kDownEach][kAcrossEach][4] = {};

  __device__ static int first_row() { return static_cast<int>(threadIdx.x) / 32 / kAcross * kDownEach * 16; }
  __device__ static int first_output() { return static_cast<int>(threadIdx.x) / 32 % kAcross * kAcrossEach * 8; }

  // Two neighbouring matrices [16, 8] of the weights' transpose: registers 0, 1 and 2, 3.
  template <bool kByChannel>
  __device__ static void load_weights(uint32_t (&registers)[4], const Element* weights, int output, int channel) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if constexpr (kByChannel) {
      const int row = channel + lane / 8 % 2 * 8 + lane % 8, column = output + lane / 16 * 8;
      load_matrices<true>(registers, weights + row * (kOutputs + kPadding<Element>)+column);
    } else {
      const int row = output + lane / 16 * 8 + lane % 8, column = channel + lane / 8 % 2 * 8;
      load_matrices<false>(registers, weights + row * (kDepth + kPadding<Element>)+column);
    }
  }

  template <bool kByChannel>
  __device__ void multiply(const Element* x, const Element* weights) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int channel = 0; channel < kDepth; channel += 16) {
      uint32_t a[kDownEach][4], b[kAcrossEach / 2][4];
#pragma unroll
      for (int i = 0; i < kDownEach; ++i) {
        const int row = first_row() + 16 * i + lane % 16, column = channel + lane / 16 * 8;
        load_matrices<false>(a[i], x + row * (kDepth + kPadding<Element>)+column);
      }
#pragma unroll
      for (int j = 0; j < kAcrossEach / 2; ++j) {
        load_weights<kByChannel>(b[j], weights, first_output() + 16 * j, channel);
      }
#pragma unroll
      for (int i = 0; i < kDownEach; ++i) {
#pragma unroll
        for (int j = 0; j < kAcrossEach; ++j) {
          multiply_matrices<Element>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }

  // visit(row, output, sum) for this thread's sums.
  template <typename Visit>
  __device__ void visit(Visit&& visit) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < kDownEach; ++i) {
#pragma unroll
      for (int j = 0; j < kAcrossEach; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          visit(first_row() + 16 * i + lane / 4 + e / 2 * 8, first_output() + 8 * j + lane % 4 * 2 + e % 2,
                sums[i][j][e]);
        }
      }
    }
  }
};

// By ordinary arithmetic, for float32: tensor cores would round it to ten bits.
template <int kRows_, int kWarps, int kDepth_, int kStages_>
struct ScalarTile {
  using Element = float;
  static constexpr int kRows = kRows_, kOutputs = 128, kDepth = kDepth_, kStages = kStages_, kThreads = 32 * kWarps;
  static constexpr int kRowsEach = kRows / kWarps, kOutputsEach = kOutputs / 32;

  float sums[kRowsEach][kOutputsEach] = {};

  __device__ static int first_row() { return static_cast<int>(threadIdx.x) / 32 * kRowsEach; }

  template <bool kByChannel>
  __device__ void multiply(const float* x, const float* weights) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 4
    for (int channel = 0; channel < kDepth; ++channel) {
      float weight[kOutputsEach];
#pragma unroll
      for (int j = 0; j < kOutputsEach; ++j) {
        const int output = lane + 32 * j;
        weight[j] = kByChannel ? weights[channel * (kOutputs + kPadding<float>)+output]
                               : weights[output * (kDepth + kPadding<float>)+channel];
      }
#pragma unroll
      for (int i = 0; i < kRowsEach; ++i) {
        const float value = x[(first_row() + i) * (kDepth + kPadding<float>)+channel];
#pragma unroll
        for (int j = 0; j < kOutputsEach; ++j) {
          sums[i][j] += value * weight[j];
        }
      }
    }
  }

  template <typename Visit>
  __device__ void visit(Visit&& visit) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i) {
#pragma unroll
      for (int j = 0; j < kOutputsEach; ++j) {
        visit(first_row() + i, lane + 32 * j, sums[i][j]);
      }
    }
  }
};

}  // namespace d2moe::kernels

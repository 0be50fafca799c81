// The weighted half of moe_forward on the CPU:
//
//   y[t] = sum_b base[b] (sum_{e of b} g h[t, e]) + sum_e (U[e] (V[e] g h[t, e]) + g bias[e])          [T, H]
//
// Down is linear, so weights come first: h is weighted when it is rounded, and all else adds up in float32 for a block
// of tokens and outputs, rounded once. Where pairs share a base, their sum is rounded once more, as its input; V g h
// is, too.
#include "ops/moe_down.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "kernels/row_conversion.h"
#include "ops/base_inputs.h"

namespace d2moe {

using kernels::ElementType;

namespace {

// Rows z of the bases: sums over a base row's pairs.
class BaseSums {
 public:
  BaseSums(const kernels::MoeRouting& routing, Rows weighted, int64_t width, ElementType input_type)
      : routing_(routing),
        weighted_(weighted),
        width_(width),
        input_type_(input_type),
        own_(routing.one_row_per_pair ? 0 : routing.base_row_begin.back(), width, input_type) {}

  Rows rows() const { return routing_.one_row_per_pair ? weighted_ : own_; }

  void add_blocks(BlockList& blocks, int64_t job) const {
    if (!routing_.one_row_per_pair) {
      blocks.add(job, routing_.base_row_begin.back(), width_);
    }
  }

  void run(const Block& block) const {
    const Workspace::Frame frame(workspace());
    const int64_t count = block.end - block.begin, offset = block.begin * size_of(input_type_);
    float* sum = workspace().take<float>(count);
    for (int64_t row = block.row_begin; row < block.row_end; ++row) {
      std::fill_n(sum, count, 0.0f);
      const int64_t pairs_end = (routing_.base_row_token[row] + 1) * routing_.top_k;
      for (int64_t pair = routing_.base_row_pair[row]; pair < pairs_end; ++pair) {
        if (routing_.base_row_of_pair[pair] == row) {
          const auto* h = static_cast<const std::byte*>(weighted_[routing_.position_of_pair[pair]]);
          kernels::add_row(h + offset, input_type_, 1.0f, nullptr, count, sum);
        }
      }
      kernels::store_row(sum, count, input_type_, static_cast<std::byte*>(own_[row]) + offset);
    }
  }

 private:
  const kernels::MoeRouting& routing_;
  const Rows weighted_;
  const int64_t width_;
  const ElementType input_type_;
  const OwnRows own_;
};

class WeightedDown {
 public:
  WeightedDown(const kernels::MoeRouting& routing, const float* weights, const BaseGroup& group, const Delta* delta,
               const Projections* projections, const BaseInputs& inputs, const at::Tensor& output)
      : routing_(routing),
        weights_(weights),
        group_(group),
        delta_(delta),
        projections_(projections),
        inputs_(inputs),
        type_(element_type(output)),
        output_(static_cast<std::byte*>(output.mutable_data_ptr())) {}

  void run() const {
    BlockList blocks(1);
    blocks.add(0, routing_.num_tokens, group_.out_features());
    run_blocks(blocks.blocks(), [&](const Block& block) { sum(block); });
  }

 private:
  void sum(const Block& block) const {
    const Workspace::Frame frame(workspace());
    const int64_t num_rows = block.row_end - block.row_begin, width = block.end - block.begin;
    const Sums sums(num_rows, width);
    float** out = workspace().take<float*>(num_rows * routing_.top_k);
    add_bases(block, sums, out);
    for (int64_t i = 0; i < routing_.num_experts; ++i) {
      add_expert(block, i, sums, out);
    }
    for (int64_t m = 0; m < num_rows; ++m) {
      const int64_t element = (block.row_begin + m) * group_.out_features() + block.begin;
      kernels::store_row(sums.rows[m], width, type_, output_ + element * size_of(type_));
    }
  }

  // [first, last) of begin to end whose tokens, which ascend, are the block's.
  template <typename TokenOf>
  static std::pair<int64_t, int64_t> of_block(const Block& block, int64_t begin, int64_t end, TokenOf&& token_of) {
    const auto first_from = [&](int64_t from, int64_t token) {
      int64_t count = end - from;
      while (count > 0) {
        const int64_t half = count / 2;
        if (token_of(from + half) < token) {
          from += half + 1;
          count -= half + 1;
        } else {
          count = half;
        }
      }
      return from;
    };
    const int64_t first = first_from(begin, block.row_begin);
    return {first, first_from(first, block.row_end)};
  }

  void add_bases(const Block& block, const Sums& sums, float** out) const {
    for (int64_t base = 0; base < group_.num_bases(); ++base) {
      if (routing_.base_row_begin[base] == routing_.base_row_begin[base + 1]) {
        continue;
      }
      // Rows of one base ascend by token, unless they are the pairs of several experts: then expert by expert.
      if (routing_.one_row_per_pair) {
        for (int64_t i = routing_.base_expert_begin[base]; i < routing_.base_expert_begin[base + 1]; ++i) {
          add_base_rows(block, base, routing_.expert_begin[i], routing_.expert_begin[i + 1], sums, out);
        }
      } else {
        add_base_rows(block, base, routing_.base_row_begin[base], routing_.base_row_begin[base + 1], sums, out);
      }
    }
  }

  void add_base_rows(const Block& block, int64_t base, int64_t begin, int64_t end, const Sums& sums,
                     float** out) const {
    const auto [first, last] = of_block(block, begin, end, [&](int64_t i) { return routing_.base_row_token[i]; });
    for (int64_t i = first; i < last; ++i) {
      out[i - first] = sums.rows[routing_.base_row_token[i] - block.row_begin];
    }
    if (first < last) {
      inputs_.matrix(base).multiply(inputs_.from(first), last - first, block.begin, block.end, out);
    }
  }

  void add_expert(const Block& block, int64_t place, const Sums& sums, float** out) const {
    const int64_t expert = routing_.expert_order[place];
    const bool has_delta = delta_ != nullptr && delta_->rank_of(expert) > 0;
    if (!has_delta && !group_.bias.has_value()) {
      return;
    }
    const auto token_of = [&](int64_t i) { return routing_.sorted_pair[i] / routing_.top_k; };
    const auto [first, last] =
        of_block(block, routing_.expert_begin[place], routing_.expert_begin[place + 1], token_of);
    for (int64_t i = first; i < last; ++i) {
      out[i - first] = sums.rows[token_of(i) - block.row_begin];
      if (group_.bias.has_value()) {
        const auto* bias = static_cast<const std::byte*>(group_.bias->const_data_ptr());
        kernels::add_row(bias + (expert * group_.out_features() + block.begin) * size_of(type_), type_,
                         weights_[routing_.sorted_pair[i]], nullptr, block.end - block.begin, out[i - first]);
      }
    }
    if (has_delta && first < last) {
      u_matrix(*delta_, expert).multiply(projections_->from(first), last - first, block.begin, block.end, out);
    }
  }

  const kernels::MoeRouting& routing_;
  const float* weights_;
  const BaseGroup& group_;
  const Delta* delta_;
  const Projections* projections_;
  const BaseInputs& inputs_;
  const ElementType type_;
  std::byte* output_;
};

}  // namespace

void weighted_down(Rows weighted, int64_t width, const kernels::MoeRouting& routing, const float* weights,
                   const BaseGroup& group, const Delta* delta, const at::Tensor& output) {
  const kernels::ProductKernels& kernels = kernels::product_kernels(element_type(group.base));
  const BaseSums sums(routing, weighted, width, kernels.input_type);
  std::optional<Projections> projections;
  if (delta != nullptr) {
    projections.emplace(*delta, routing, weighted, nullptr, kernels);
  }
  BlockList blocks(1 + num_active_experts(routing));
  sums.add_blocks(blocks, routing.num_experts);
  if (delta != nullptr) {
    projections->add_blocks(blocks, 0);
  }
  run_blocks(blocks.blocks(), [&](const Block& block) {
    if (block.job == routing.num_experts) {
      sums.run(block);
    } else {
      projections->run(block, 0);
    }
  });
  const BaseInputs inputs(group, routing, sums.rows(), width, nullptr, kernels.input_type);
  WeightedDown(routing, weights, group, delta, delta == nullptr ? nullptr : &*projections, inputs, output).run();
}

}  // namespace d2moe

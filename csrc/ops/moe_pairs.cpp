// The products of every (token, expert) pair on the CPU, [pairs, R], and what becomes of them.
//
// First bases multiply their rows, and V's theirs, all in one go over the threads; then block by block, for some of an
// expert's pairs and some of their outputs, base, bias and U V x come together in float32, and finish() takes them
// while they are in the cache. A base that no two pairs share is multiplied there, too.
//
// Error: V x, the base's product where pairs share it, and what finish() stores are rounded once to the products' or
// the forward's dtype; all else is in float32.
#include "ops/moe_pairs.h"

#include <algorithm>
#include <optional>

#include "kernels/row_conversion.h"
#include "ops/base_inputs.h"

namespace d2moe {

using kernels::ElementType;

namespace {

// Outputs begin to end of a block as runs of rows of the matrices: one, or gate's and up's.
struct Segments {
  int count;
  int64_t begin[2];
  int64_t width;
};

class PairProducts {
 public:
  PairProducts(const PairSource& source, const kernels::MoeRouting& routing, const BaseGroup& group,
               at::ArrayRef<Delta> deltas, OutputOrder order)
      : routing_(routing),
        group_(group),
        deltas_(deltas),
        order_(order),
        type_(element_type(group.base)),
        num_pairs_(static_cast<int64_t>(routing.sorted_pair.size())),
        kernels_(kernels::product_kernels(type_)),
        pair_source_(source_rows(source)),
        inputs_(group, routing, source.rows, source.width,
                (source.row_per_pair ? routing.base_row_pair : routing.base_row_token).data(), kernels_.input_type),
        base_rows_(routing.one_row_per_pair ? 0 : routing.base_row_begin.back(), group.out_features(), type_) {
    for (const Delta& delta : deltas) {
      projections_[num_projections_++].emplace(delta, routing, source.rows, pair_source_, kernels_);
    }
  }

  void run(const FinishPairs& finish) {
    multiply_bases_and_v();
    const int64_t num_outputs = order_ == OutputOrder::kHalves || order_ == OutputOrder::kAlternating
                                    ? group_.out_features() / 2
                                    : group_.out_features();
    BlockList blocks(num_active_experts(routing_));
    for (int64_t i = 0; i < routing_.num_experts; ++i) {
      blocks.add(i, routing_.expert_begin[i + 1] - routing_.expert_begin[i], num_outputs);
    }
    run_blocks(blocks.blocks(), [&](const Block& block) { combine(block, finish); });
  }

 private:
  const int64_t* source_rows(const PairSource& source) const {
    int64_t* rows = workspace().take<int64_t>(num_pairs_);
    for (int64_t i = 0; i < num_pairs_; ++i) {
      const int64_t pair = routing_.sorted_pair[i];
      rows[i] = source.row_per_pair ? pair : pair / routing_.top_k;
    }
    return rows;
  }

  void multiply_bases_and_v() {
    const int64_t num_bases = routing_.one_row_per_pair ? 0 : group_.num_bases();
    BlockList blocks(num_bases + num_active_experts(routing_) * num_projections_);
    for (int64_t base = 0; base < num_bases; ++base) {
      blocks.add(base, routing_.base_row_begin[base + 1] - routing_.base_row_begin[base], group_.out_features());
    }
    for (int d = 0; d < num_projections_; ++d) {
      projections_[d]->add_blocks(blocks, num_bases + d * routing_.num_experts);
    }
    run_blocks(blocks.blocks(), [&](const Block& block) {
      if (block.job < num_bases) {
        multiply_base(block);
      } else {
        const int64_t d = (block.job - num_bases) / routing_.num_experts;
        projections_[d]->run(block, num_bases + d * routing_.num_experts);
      }
    });
  }

  void multiply_base(const Block& block) const {
    const Workspace::Frame frame(workspace());
    const int64_t num_rows = block.row_end - block.row_begin, width = block.end - block.begin;
    const int64_t first = routing_.base_row_begin[block.job] + block.row_begin;
    const Sums sums(num_rows, width);
    inputs_.matrix(block.job).multiply(inputs_.from(first), num_rows, block.begin, block.end, sums.rows);
    for (int64_t m = 0; m < num_rows; ++m) {
      kernels::store_row(sums.rows[m], width, type_,
                         static_cast<std::byte*>(base_rows_[first + m]) + block.begin * size_of(type_));
    }
  }

  Segments segments_of(const Block& block) const {
    switch (order_) {
      case OutputOrder::kHalves:
        return {2, {block.begin, group_.out_features() / 2 + block.begin}, block.end - block.begin};
      case OutputOrder::kAlternating:
        return {1, {2 * block.begin, 0}, 2 * (block.end - block.begin)};
      default:
        return {1, {block.begin, 0}, block.end - block.begin};
    }
  }

  void combine(const Block& block, const FinishPairs& finish) const {
    const Workspace::Frame frame(workspace());
    const Segments segments = segments_of(block);
    const int64_t num_rows = block.row_end - block.row_begin;
    const int64_t first = routing_.expert_begin[block.job] + block.row_begin;
    const Sums sums(num_rows, segments.count * segments.width);
    float** part = workspace().take<float*>(num_rows);
    for (int s = 0; s < segments.count; ++s) {
      for (int64_t m = 0; m < num_rows; ++m) {
        part[m] = sums.rows[m] + s * segments.width;
      }
      add_products(block.job, first, num_rows, segments.begin[s], segments.begin[s] + segments.width, part);
    }
    finish({first, num_rows, block.begin, block.end, sums.rows});
  }

  // Base, bias and deltas of outputs begin to end.
  void add_products(int64_t place, int64_t first, int64_t num_rows, int64_t begin, int64_t end,
                    float* const* sums) const {
    const int64_t expert = routing_.expert_order[place], width = end - begin;
    if (routing_.one_row_per_pair) {
      const int64_t base = group_.expert_to_base.const_data_ptr<int32_t>()[expert];
      inputs_.matrix(base).multiply(inputs_.from(first), num_rows, begin, end, sums);
    }
    for (int64_t m = 0; m < num_rows; ++m) {
      if (!routing_.one_row_per_pair) {
        const int64_t row = routing_.base_row_of_pair[routing_.sorted_pair[first + m]];
        kernels::add_row(static_cast<const std::byte*>(base_rows_[row]) + begin * size_of(type_), type_, 1.0f, nullptr,
                         width, sums[m]);
      }
      if (group_.bias.has_value()) {
        const auto* bias = static_cast<const std::byte*>(group_.bias->const_data_ptr());
        kernels::add_row(bias + (expert * group_.out_features() + begin) * size_of(type_), type_, 1.0f, nullptr, width,
                         sums[m]);
      }
    }
    int64_t delta_begin = 0;
    for (int d = 0; d < num_projections_; ++d) {
      const int64_t delta_end = delta_begin + deltas_[d].u.size(1);
      add_delta(d, expert, first, num_rows, std::max(begin, delta_begin), std::min(end, delta_end), delta_begin, begin,
                sums);
      delta_begin = delta_end;
    }
  }

  // Outputs begin to end, which a delta has that begins with output delta_begin; sums begin with output sums_begin.
  void add_delta(int d, int64_t expert, int64_t first, int64_t num_rows, int64_t begin, int64_t end,
                 int64_t delta_begin, int64_t sums_begin, float* const* sums) const {
    if (begin >= end || deltas_[d].rank_of(expert) == 0) {
      return;
    }
    const Workspace::Frame frame(workspace());
    float** part = workspace().take<float*>(num_rows);
    for (int64_t m = 0; m < num_rows; ++m) {
      part[m] = sums[m] + (begin - sums_begin);
    }
    u_matrix(deltas_[d], expert)
        .multiply(projections_[d]->from(first), num_rows, begin - delta_begin, end - delta_begin, part);
  }

  const kernels::MoeRouting& routing_;
  const BaseGroup& group_;
  const at::ArrayRef<Delta> deltas_;
  const OutputOrder order_;
  const ElementType type_;
  const int64_t num_pairs_;
  const kernels::ProductKernels& kernels_;
  const int64_t* pair_source_;
  const BaseInputs inputs_;
  const OwnRows base_rows_;  // none where each pair has its own
  std::optional<Projections> projections_[2];
  int num_projections_ = 0;
};

}  // namespace

void multiply_pairs(const PairSource& source, const kernels::MoeRouting& routing, const BaseGroup& group,
                    at::ArrayRef<Delta> deltas, OutputOrder order, const FinishPairs& finish) {
  if (!routing.sorted_pair.empty()) {
    PairProducts(source, routing, group, deltas, order).run(finish);
  }
}

}  // namespace d2moe

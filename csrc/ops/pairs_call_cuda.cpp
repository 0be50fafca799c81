#include "ops/pairs_call_cuda.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>

#include "kernels/grouped_product_cuda.h"
#include "kernels/tuning_cuda.h"

namespace d2moe {

using kernels::BaseRowKind;
using kernels::BaseRows;

namespace {

constexpr int64_t kFewCounters = 4096;

kernels::MoePairs pairs_of(const char* op, const at::Tensor& top_k_index, int64_t num_experts) {
  TORCH_CHECK(top_k_index.numel() < std::numeric_limits<int32_t>::max(), op,
              ": top_k_index must hold fewer than 2^31 ids on a GPU, got ", top_k_index.numel());
  return {top_k_index.const_data_ptr(), top_k_index.scalar_type() == at::kLong, top_k_index.size(0),
          static_cast<int32_t>(top_k_index.size(1)), static_cast<int32_t>(num_experts)};
}

bool many_rows(int64_t num_rows, int64_t num_groups) { return num_rows >= kernels::kManyRowsEach * num_groups; }

}  // namespace

PairsCall::PairsCall(const char* op, const at::Tensor& input, const at::Tensor& index, int64_t num_experts)
    : context(input),
      options(input.options()),
      type(element_type(input)),
      top_k_index(index.contiguous()),
      pairs(pairs_of(op, top_k_index, num_experts)),
      op_(op) {}

BaseRows PairsCall::base_rows(const BaseGroup& group, bool per_pair) const {
  // As many bases as experts: their tokens have nothing in common but by repetition, which only scores would notice.
  const bool own_bases = group.num_bases() >= group.num_experts() && !group.prunes_dynamically();
  const BaseRowKind kind = per_pair                 ? BaseRowKind::kPairs
                           : group.num_bases() == 1 ? BaseRowKind::kTokens
                           : own_bases              ? BaseRowKind::kPairs
                                                    : BaseRowKind::kFirst;
  return {group.expert_to_base.const_data_ptr<int32_t>(), static_cast<int32_t>(group.num_bases()), kind};
}

SortedGroups PairsCall::sorted_groups(int64_t num_rows, int64_t num_groups, bool positions) const {
  TORCH_CHECK(num_groups <= kernels::kMostRowGroups, op_, ": there must be at most ", kernels::kMostRowGroups,
              " experts and bases on a GPU, got ", num_groups);
  const int tile_rows = kernels::product_tile_rows(type, many_rows(num_rows, num_groups));
  const int64_t num_tiles = kernels::most_tiles(num_rows, num_groups, tile_rows);
  const at::TensorOptions integers = options.dtype(at::kInt);
  SortedGroups groups{at::empty({num_rows}, integers),
                      at::empty({num_groups + 1}, integers),
                      at::empty({num_tiles, 2}, integers),
                      at::empty({positions ? num_rows : 0}, integers),
                      {}};
  groups.rows = {groups.order.data_ptr<int32_t>(),
                 groups.offsets.data_ptr<int32_t>(),
                 positions ? groups.position.data_ptr<int32_t>() : nullptr,
                 reinterpret_cast<int2*>(groups.tiles.data_ptr<int32_t>()),
                 tile_rows,
                 static_cast<int32_t>(num_tiles),
                 static_cast<int32_t>(num_groups),
                 num_rows};
  return groups;
}

void PairsCall::sort(bool experts, const std::vector<BaseRows>& base_rows, bool positions) {
  if (pairs.num_tokens <= kernels::kUnsortedTokens) {
    return;
  }
  std::vector<kernels::RowSort> sorts;
  if (experts) {
    experts_ = sorted_groups(pairs.count(), pairs.num_experts, false);
    sorts.push_back({experts_->rows, false, {}});
  }
  for (const BaseRows& rows : base_rows) {
    if (rows.kind != BaseRowKind::kTokens && by_base(rows) == nullptr) {
      bases_.emplace_back(rows, sorted_groups(rows.count(pairs), rows.num_bases, positions));
      sorts.push_back({bases_.back().second.rows, true, rows});
    }
  }
  if (!sorts.empty()) {
    check_cuda(kernels::launch_row_sorts(pairs, sorts.data(), static_cast<int>(sorts.size()), context.stream()));
  }
}

const SortedGroups* PairsCall::groups_of(const BaseRows& rows) const {
  for (const auto& [sorted, groups] : bases_) {
    if (sorted.expert_to_base == rows.expert_to_base && sorted.num_bases == rows.num_bases &&
        sorted.kind == rows.kind) {
      return &groups;
    }
  }
  return nullptr;
}

const kernels::SortedRows* PairsCall::by_base(const BaseRows& rows) const {
  const SortedGroups* groups = groups_of(rows);
  return groups == nullptr ? nullptr : &groups->rows;
}

at::Tensor PairsCall::empty(int64_t rows, int64_t width) const { return at::empty({rows, width}, options); }

at::Tensor PairsCall::counters(int64_t count) {
  if (!counters_.defined() || counters_.numel() < count) {
    counters_ = at::zeros({std::max(count, kFewCounters)}, options.dtype(at::kInt));
  }
  return counters_;
}

}  // namespace d2moe

#include "kernels/moe_routing.h"

#include <cstddef>
#include <numeric>

namespace d2moe::kernels {

namespace {

// counts[i + 1] holds the count of i; afterwards counts[i] is where i begins.
void exclusive_sum(std::vector<int64_t>& counts) { std::partial_sum(counts.begin(), counts.end(), counts.begin()); }

void order_experts(MoeRouting& routing, const int32_t* expert_to_base) {
  routing.base_expert_begin.assign(routing.num_bases + 1, 0);
  for (int64_t expert = 0; expert < routing.num_experts; ++expert) {
    ++routing.base_expert_begin[expert_to_base[expert] + 1];
  }
  exclusive_sum(routing.base_expert_begin);
  std::vector<int64_t> next = routing.base_expert_begin;
  routing.expert_order.resize(routing.num_experts);
  for (int64_t expert = 0; expert < routing.num_experts; ++expert) {
    routing.expert_order[next[expert_to_base[expert]]++] = static_cast<int32_t>(expert);
  }
}

void sort_pairs(MoeRouting& routing) {
  std::vector<int64_t> place(routing.num_experts);
  for (int64_t i = 0; i < routing.num_experts; ++i) {
    place[routing.expert_order[i]] = i;
  }
  routing.expert_begin.assign(routing.num_experts + 1, 0);
  for (const int32_t expert : routing.expert_of_pair) {
    if (expert >= 0) {
      ++routing.expert_begin[place[expert] + 1];
    }
  }
  exclusive_sum(routing.expert_begin);
  std::vector<int64_t> next = routing.expert_begin;
  const int64_t num_pairs = static_cast<int64_t>(routing.expert_of_pair.size());
  routing.sorted_pair.resize(routing.expert_begin.back());
  routing.position_of_pair.assign(num_pairs, -1);
  for (int64_t pair = 0; pair < num_pairs; ++pair) {
    const int32_t expert = routing.expert_of_pair[pair];
    if (expert >= 0) {
      const int64_t position = next[place[expert]]++;
      routing.sorted_pair[position] = pair;
      routing.position_of_pair[pair] = position;
    }
  }
}

// Calls visit(pair, base, is_first) for every valid pair in order; is_first: no earlier slot of its token has that
// base.
template <typename Visit>
void visit_base_rows(const MoeRouting& routing, const int32_t* expert_to_base, Visit&& visit) {
  std::vector<int64_t> last_token(routing.num_bases, -1);
  for (int64_t pair = 0; pair < static_cast<int64_t>(routing.expert_of_pair.size()); ++pair) {
    const int32_t expert = routing.expert_of_pair[pair];
    if (expert >= 0) {
      const int64_t token = pair / routing.top_k;
      const int32_t base = expert_to_base[expert];
      visit(pair, base, last_token[base] != token);
      last_token[base] = token;
    }
  }
}

void take_pairs_as_base_rows(MoeRouting& routing) {
  routing.base_row_begin.resize(routing.num_bases + 1);
  for (int64_t base = 0; base <= routing.num_bases; ++base) {
    routing.base_row_begin[base] = routing.expert_begin[routing.base_expert_begin[base]];
  }
  routing.base_row_pair = routing.sorted_pair;
  routing.base_row_of_pair = routing.position_of_pair;
}

void share_base_rows(MoeRouting& routing, const int32_t* expert_to_base) {
  exclusive_sum(routing.base_row_begin);
  routing.base_row_pair.resize(routing.base_row_begin.back());
  routing.base_row_of_pair.assign(routing.expert_of_pair.size(), -1);
  std::vector<int64_t> next = routing.base_row_begin;
  visit_base_rows(routing, expert_to_base, [&](int64_t pair, int32_t base, bool is_first) {
    if (is_first) {
      routing.base_row_pair[next[base]++] = pair;
    }
    routing.base_row_of_pair[pair] = next[base] - 1;
  });
}

}  // namespace

template <typename Index>
MoeRouting route_pairs(const Index* top_k_index, int64_t num_tokens, int64_t top_k, const int32_t* expert_to_base,
                       int64_t num_experts, int64_t num_bases, bool force_one_row_per_pair) {
  MoeRouting routing;
  routing.num_tokens = num_tokens;
  routing.top_k = top_k;
  routing.num_experts = num_experts;
  routing.num_bases = num_bases;
  routing.expert_of_pair.resize(num_tokens * top_k);
  for (int64_t pair = 0; pair < num_tokens * top_k; ++pair) {
    const Index id = top_k_index[pair];
    routing.expert_of_pair[pair] = id >= 0 && id < num_experts ? static_cast<int32_t>(id) : -1;
  }
  order_experts(routing, expert_to_base);
  sort_pairs(routing);

  routing.base_row_begin.assign(num_bases + 1, 0);
  visit_base_rows(routing, expert_to_base,
                  [&](int64_t, int32_t base, bool is_first) { routing.base_row_begin[base + 1] += is_first; });
  const int64_t shared_rows = std::accumulate(routing.base_row_begin.begin(), routing.base_row_begin.end(), int64_t{0});
  routing.one_row_per_pair = force_one_row_per_pair || shared_rows == static_cast<int64_t>(routing.sorted_pair.size());
  if (routing.one_row_per_pair) {
    take_pairs_as_base_rows(routing);
  } else {
    share_base_rows(routing, expert_to_base);
  }
  routing.base_row_token.resize(routing.base_row_pair.size());
  for (std::size_t row = 0; row < routing.base_row_pair.size(); ++row) {
    routing.base_row_token[row] = routing.base_row_pair[row] / top_k;
  }
  return routing;
}

template MoeRouting route_pairs(const int32_t*, int64_t, int64_t, const int32_t*, int64_t, int64_t, bool);
template MoeRouting route_pairs(const int64_t*, int64_t, int64_t, const int32_t*, int64_t, int64_t, bool);

}  // namespace d2moe::kernels

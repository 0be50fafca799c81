// Which rows each base and each expert multiplies: a counting sort of the (token, expert) pairs.
//
// Pair p = token * top_k + slot. Pairs whose id is no expert (< 0 or >= num_experts) take part in nothing.
//
// Experts are ordered by base, and pairs by expert, so that an expert's pairs and a base's pairs are both contiguous.
// The base itself is multiplied once per *base row*, a distinct (token, base): rows are ordered by base, then token.
// Where no token has two experts of one base (num_bases == num_experts, or top_k == 1), base rows and pairs are the
// same thing and rows stand in the order of the sorted pairs, so that neither needs a copy of the other.
#pragma once

#include <cstdint>
#include <vector>

namespace d2moe::kernels {

struct MoeRouting {
  int64_t num_tokens;
  int64_t top_k;
  int64_t num_experts;
  int64_t num_bases;
  std::vector<int32_t> expert_of_pair;  // [T * k], -1: no expert
  std::vector<int32_t> expert_order;    // [E], by base, then number
  std::vector<int64_t>
      base_expert_begin;  // [K + 1]: base b has expert_order[base_expert_begin[b] : base_expert_begin[b + 1]]
  std::vector<int64_t> expert_begin;      // [E + 1], in expert_order's order, into sorted_pair
  std::vector<int64_t> sorted_pair;       // [valid pairs], of one expert in ascending order
  std::vector<int64_t> position_of_pair;  // [T * k], its place in sorted_pair, or -1
  std::vector<int64_t> base_row_begin;    // [K + 1], into the base rows
  std::vector<int64_t> base_row_token;    // [base rows]
  std::vector<int64_t> base_row_pair;     // [base rows], the first of its pairs
  std::vector<int64_t> base_row_of_pair;  // [T * k], or -1
  bool one_row_per_pair;                  // base rows are the sorted pairs
};

// top_k_index [num_tokens, top_k] contiguous; expert_to_base [num_experts], each in [0, num_bases).
// force_one_row_per_pair multiplies the base for each pair even where pairs could share a row.
template <typename Index>
MoeRouting route_pairs(const Index* top_k_index, int64_t num_tokens, int64_t top_k, const int32_t* expert_to_base,
                       int64_t num_experts, int64_t num_bases, bool force_one_row_per_pair);

}  // namespace d2moe::kernels

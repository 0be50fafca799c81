// The (token, expert) pairs of a call as CUDA kernels read them, and the rows that a group of bases multiplies.
#pragma once

#include <cstdint>

namespace d2moe::kernels {

// Pair t * top_k + slot. An id outside 0 .. num_experts - 1 is no expert: its pair enters nothing.
struct MoePairs {
  const void* top_k_index;  // [num_tokens, top_k] int64, or int32
  bool wide_index;          // int64
  int64_t num_tokens;
  int32_t top_k;
  int32_t num_experts;

  constexpr int64_t count() const { return num_tokens * top_k; }
};

// A base multiplies each token once, however many of its experts share the base:
//
//   kTokens    one base: row t is token t
//   kFirst     several: row p is the token of pair p, where no earlier slot of that token has the same base
//   kPairs     row p is pair p
enum class BaseRowKind { kTokens, kFirst, kPairs };

struct BaseRows {
  const int32_t* expert_to_base;  // [num_experts]
  int32_t num_bases;
  BaseRowKind kind;

  constexpr int64_t count(const MoePairs& pairs) const {
    return kind == BaseRowKind::kTokens ? pairs.num_tokens : pairs.count();
  }
};

}  // namespace d2moe::kernels

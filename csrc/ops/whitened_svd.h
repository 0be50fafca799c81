// What whitened_svd is on every device: its checks, its sentences, and what is the same for a matrix and for a stack.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace d2moe::whitened {

constexpr const char* kOp = "whitened_svd";
constexpr int kMostRidgeRaises = 3;
constexpr double kMostRidgeGrowth = 1e3;  // tenfold, three times
constexpr int64_t kGramBlockRows = 1024;  // rows of a Gram converted to float64 at a time: 117 MB at n = 14336

// Raises a sentence that names the argument, the rule and what was given, with the batch entry where it is a value.
void check_arguments(const at::Tensor& delta, int64_t rank, const std::optional<at::Tensor>& gram,
                     const std::optional<at::Tensor>& left_gram, double ridge, double left_ridge);
void check_diagonal(const char* name, double smallest, int64_t entry);

// u [B, m, rank], v [B, rank, n], singular_values [B, min(m, n)], ridge_used [B], 0 so far.
using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
Results empty_results(const at::Tensor& delta, int64_t rank);

// Raise, always.
void refuse_without_factor(const char* name, double ridge, int64_t entry);
void refuse_negative_eigenvalue(const char* name, double ridge, int64_t entry);

// The even power of two next to the largest magnitude, halved: values / 4^exponent stand at about 1, exactly.
int half_exponent(double largest);

// Shares each component's magnitude evenly between its column of `tall` [..., p, r] and its row of `wide` [..., r, q],
// with the factor `magnitude` [..., 1] taken up by both: neither can overflow float32, nor float16 in the checkpoint,
// unless their product does. A component without magnitude becomes 0.
void balance(at::Tensor& tall, at::Tensor& wide, const at::Tensor& magnitude);

}  // namespace d2moe::whitened

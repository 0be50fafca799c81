// The messages of every operator: one sentence with operator, argument, rule and the value it got.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <initializer_list>
#include <optional>

namespace d2moe {

// The dtypes of the forward (float32, bfloat16, float16) and of compression (float32, float64).
inline bool is_forward_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
}

inline bool is_compression_dtype(at::ScalarType dtype) { return dtype == at::kFloat || dtype == at::kDouble; }

#define D2MOE_CHECK_DIM(op, tensor, rank)                                                                \
  TORCH_CHECK((tensor).dim() == (rank), op, ": " #tensor " must have ", rank, " dimensions, got shape ", \
              (tensor).sizes())

#define D2MOE_CHECK_SHAPE(op, tensor, ...)                                                                  \
  do {                                                                                                      \
    const std::initializer_list<int64_t> d2moe_expected_ = {__VA_ARGS__};                                   \
    TORCH_CHECK((tensor).sizes() == at::IntArrayRef(d2moe_expected_), op, ": " #tensor " must have shape ", \
                at::IntArrayRef(d2moe_expected_), ", got ", (tensor).sizes());                              \
  } while (false)

#define D2MOE_CHECK_DTYPE(op, tensor, expected)                                                       \
  TORCH_CHECK((tensor).scalar_type() == (expected), op, ": " #tensor " must be ", expected, ", got ", \
              (tensor).scalar_type())

#define D2MOE_CHECK_DEVICE(op, tensor, like)                                                          \
  TORCH_CHECK((tensor).device() == (like).device(), op, ": " #tensor " must be on ", (like).device(), \
              " like " #like ", got ", (tensor).device())

}  // namespace d2moe

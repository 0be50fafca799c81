// The arguments of moe_forward and its halves: what must hold, and the sentence that says so.
#include <c10/util/Exception.h>

#include <algorithm>
#include <sstream>

#include "ops/checks.h"
#include "ops/moe_forward.h"

namespace d2moe {

namespace {

// A free dimension of an expected shape, shown as a name.
struct Dim {
  Dim(int64_t size) : size(size), name(nullptr) {}  // NOLINT(runtime/explicit): shapes read as lists of sizes
  Dim(const char* name) : size(-1), name(name) {}   // NOLINT(runtime/explicit)
  int64_t size;
  const char* name;
};

std::ostream& operator<<(std::ostream& stream, const Dim& dim) {
  return dim.name != nullptr ? stream << dim.name : stream << dim.size;
}

void check_shape(const char* op, const std::string& name, const at::Tensor& tensor, const std::vector<Dim>& expected) {
  bool matches = tensor.dim() == static_cast<int64_t>(expected.size());
  for (size_t i = 0; matches && i < expected.size(); ++i) {
    matches = expected[i].name != nullptr || tensor.size(i) == expected[i].size;
  }
  if (!matches) {
    std::ostringstream shape;
    for (size_t i = 0; i < expected.size(); ++i) {
      shape << (i == 0 ? "" : ", ") << expected[i];
    }
    TORCH_CHECK(false, op, ": ", name, " must have shape [", shape.str(), "], got ", tensor.sizes());
  }
}

void check_dtype(const char* op, const std::string& name, const at::Tensor& tensor, at::ScalarType expected) {
  TORCH_CHECK(tensor.scalar_type() == expected, op, ": ", name, " must be ", expected, ", got ", tensor.scalar_type());
}

void check_device(const char* op, const std::string& name, const at::Tensor& tensor, const at::Tensor& input) {
  TORCH_CHECK(tensor.device() == input.device(), op, ": ", name, " must be on ", input.device(),
              " like the input, got ", tensor.device());
}

void check_list(const char* op, const std::string& name, const at::Tensor& tensor, const std::vector<Dim>& expected,
                at::ScalarType dtype, const at::Tensor& input) {
  check_device(op, name, tensor, input);
  check_dtype(op, name, tensor, dtype);
  check_shape(op, name, tensor, expected);
}

// Every value must be in [0, limit).
void check_values(const char* op, const std::string& name, const at::Tensor& list, int64_t limit) {
  const int32_t* values = list.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < list.numel(); ++i) {
    TORCH_CHECK(values[i] >= 0 && values[i] < limit, op, ": ", name, " must hold values from 0 to ", limit - 1,
                ", got ", values[i]);
  }
}

void check_slices(const char* op, const std::string& start_name, const std::string& factor_name, const int32_t* start,
                  const int32_t* rank, int64_t num_experts, int64_t num_rows) {
  for (int64_t e = 0; e < num_experts; ++e) {
    TORCH_CHECK(start[e] >= 0 && int64_t{start[e]} + rank[e] <= num_rows, op, ": ", start_name,
                " and the rank must stay within the ", num_rows, " rows of ", factor_name, ", got start ", start[e],
                " and rank ", rank[e], " for expert ", e);
  }
}

std::string delta_name(const char* part, size_t index) { return std::string(part) + "[" + std::to_string(index) + "]"; }

// V of gauge-fixed factors: rank * (in - rank) elements from its start on.
void check_stored_elements(const char* op, const Delta& delta, const int32_t* start, const int32_t* rank) {
  for (int64_t e = 0; e < delta.rank.numel(); ++e) {
    TORCH_CHECK(rank[e] <= delta.in_features(), op, ": ", delta_name("delta_rank", delta.index),
                " must be at most the ", delta.in_features(), " columns of ", delta_name("delta_v", delta.index),
                " where there are pivots, got ", rank[e], " for expert ", e);
    const int64_t elements = int64_t{rank[e]} * (delta.in_features() - rank[e]);
    TORCH_CHECK(start[e] >= 0 && start[e] + elements <= delta.v.numel(), op, ": ",
                delta_name("delta_v_start", delta.index), " and the rank must stay within the ", delta.v.numel(),
                " elements of ", delta_name("delta_v", delta.index), ", got start ", start[e], " and rank ", rank[e],
                " for expert ", e);
  }
}

// A delta of a higher rank would be a larger matrix than the one it is added to: no buffer is made for it.
void check_full_rank(const char* op, const Delta& delta, const int32_t* rank) {
  const int64_t full = std::min(delta.u.size(1), delta.in_features());
  for (int64_t e = 0; e < delta.rank.numel(); ++e) {
    TORCH_CHECK(rank[e] <= full, op, ": ", delta_name("delta_rank", delta.index),
                " must be at most min(out, in) = ", full, ", got ", rank[e], " for expert ", e);
  }
}

}  // namespace

std::vector<Delta> make_deltas(const char* op, at::TensorList u, at::TensorList v, at::TensorList rank,
                               at::TensorList u_start, at::TensorList v_start, at::TensorList pivots,
                               at::TensorList u_scale, at::TensorList v_scale) {
  const auto check_length = [&](const char* name, at::TensorList list) {
    TORCH_CHECK(list.size() == u.size(), op, ": ", name, " must hold ", u.size(), " tensors like delta_u, got ",
                list.size());
  };
  check_length("delta_v", v);
  check_length("delta_rank", rank);
  check_length("delta_u_start", u_start);
  check_length("delta_v_start", v_start);
  if (!pivots.empty()) {
    check_length("delta_pivots", pivots);
  }
  const bool quantised = !u_scale.empty() || !v_scale.empty();
  if (quantised) {
    check_length("delta_u_scale", u_scale);
    check_length("delta_v_scale", v_scale);
  }
  const auto optional = [](bool given, at::TensorList list, size_t i) {
    return given ? std::optional<at::Tensor>(list[i]) : std::nullopt;
  };
  std::vector<Delta> deltas;
  for (size_t i = 0; i < u.size(); ++i) {
    deltas.push_back({op, i, u[i], v[i], rank[i], u_start[i], v_start[i], optional(!pivots.empty(), pivots, i),
                      optional(quantised, u_scale, i), optional(quantised, v_scale, i)});
  }
  return deltas;
}

void check_input(const char* op, const char* name, const at::Tensor& input) {
  TORCH_CHECK(is_forward_dtype(input.scalar_type()), op, ": ", name, " must be float32, bfloat16 or float16, got ",
              input.scalar_type());
  TORCH_CHECK(input.dim() == 2, op, ": ", name, " must have 2 dimensions, got shape ", input.sizes());
}

void check_routing(const char* op, const at::Tensor& top_k_index, const at::Tensor& input, const char* input_name) {
  check_device(op, "top_k_index", top_k_index, input);
  TORCH_CHECK(top_k_index.scalar_type() == at::kLong || top_k_index.scalar_type() == at::kInt, op,
              ": top_k_index must be int64 or int32, got ", top_k_index.scalar_type());
  if (std::string(input_name) == "hidden_states") {
    check_shape(op, "top_k_index", top_k_index, {input.size(0), "k"});
  } else {
    check_shape(op, "top_k_index", top_k_index, {"T", "k"});
    check_shape(op, input_name, input, {top_k_index.numel(), "I"});
  }
}

void check_weights(const char* op, const at::Tensor& top_k_weights, const at::Tensor& top_k_index) {
  check_device(op, "top_k_weights", top_k_weights, top_k_index);
  TORCH_CHECK(is_forward_dtype(top_k_weights.scalar_type()), op,
              ": top_k_weights must be float32, bfloat16 or float16, got ", top_k_weights.scalar_type());
  check_shape(op, "top_k_weights", top_k_weights, {top_k_index.size(0), top_k_index.size(1)});
}

void check_base_group(const char* op, const BaseGroup& group, const at::Tensor& input, int64_t in_features) {
  const std::string prefix = std::string(group.name) + "_";
  check_list(op, prefix + "base", group.base, {"K", "out", "kept"}, input.scalar_type(), input);
  const int64_t num_bases = group.num_bases();
  if (group.columns.has_value()) {
    check_list(op, prefix + "columns", *group.columns, {num_bases, group.kept()}, at::kInt, input);
  } else {
    TORCH_CHECK(group.kept() == in_features, op, ": ", prefix, "base without ", prefix, "columns must have ",
                in_features, " columns, got ", group.kept());
  }
  TORCH_CHECK(group.keep >= 0 && group.keep <= group.kept(), op, ": ", prefix, "keep must be between 0 and the ",
              group.kept(), " kept columns, got ", group.keep);
  if (group.column_norms.has_value()) {
    check_list(op, prefix + "column_norms", *group.column_norms, {num_bases, group.kept()}, at::kFloat, input);
  } else {
    TORCH_CHECK(!group.prunes_dynamically(), op, ": ", prefix, "column_norms must be given where ", prefix,
                "keep is less than the ", group.kept(), " kept columns, got None with ", prefix, "keep = ", group.keep);
  }
  check_list(op, prefix + "expert_to_base", group.expert_to_base, {"E"}, at::kInt, input);
  if (group.bias.has_value()) {
    check_list(op, prefix + "bias", *group.bias, {group.num_experts(), group.out_features()}, input.scalar_type(),
               input);
  }
}

void check_deltas(const char* op, const BaseGroup& group, at::ArrayRef<Delta> deltas, const at::Tensor& input,
                  int64_t in_features) {
  TORCH_CHECK(deltas.size() < 2 || group.out_features() % 2 == 0, op, ": ", group.name,
              "_base must have an even number of rows where gate and up have a delta each, got ", group.out_features());
  for (const Delta& delta : deltas) {
    const size_t index = delta.index;
    const int64_t out_features = group.out_features() / static_cast<int64_t>(deltas.size());
    const at::ScalarType dtype = delta.u_scale.has_value() ? at::kChar : input.scalar_type();
    check_list(op, delta_name("delta_u", index), delta.u, {"R_u", out_features}, dtype, input);
    check_list(op, delta_name("delta_v", index), delta.v, {"R_v", in_features}, dtype, input);
    check_list(op, delta_name("delta_rank", index), delta.rank, {group.num_experts()}, at::kInt, input);
    check_list(op, delta_name("delta_u_start", index), delta.u_start, {group.num_experts()}, at::kInt, input);
    check_list(op, delta_name("delta_v_start", index), delta.v_start, {group.num_experts()}, at::kInt, input);
    if (delta.pivots.has_value()) {
      check_list(op, delta_name("delta_pivots", index), *delta.pivots, {delta.u.size(0)}, at::kInt, input);
    }
    if (delta.u_scale.has_value()) {
      const int64_t v_scales = delta.pivots.has_value() ? delta.u.size(0) : delta.v.size(0);
      check_list(op, delta_name("delta_u_scale", index), *delta.u_scale, {delta.u.size(0)}, input.scalar_type(), input);
      check_list(op, delta_name("delta_v_scale", index), *delta.v_scale, {v_scales}, input.scalar_type(), input);
    }
  }
}

void check_base_group_indices(const char* op, const BaseGroup& group, int64_t in_features) {
  const std::string prefix = std::string(group.name) + "_";
  check_values(op, prefix + "expert_to_base", group.expert_to_base, group.num_bases());
  if (group.columns.has_value()) {
    check_values(op, prefix + "columns", *group.columns, in_features);
  }
}

void check_delta_indices(const char* op, at::ArrayRef<Delta> deltas) {
  for (const Delta& delta : deltas) {
    const size_t index = delta.index;
    const int32_t* rank = delta.rank.const_data_ptr<int32_t>();
    for (int64_t e = 0; e < delta.rank.numel(); ++e) {
      TORCH_CHECK(rank[e] >= 0, op, ": ", delta_name("delta_rank", index), " must not be negative, got ", rank[e],
                  " for expert ", e);
    }
    check_slices(op, delta_name("delta_u_start", index), delta_name("delta_u", index),
                 delta.u_start.const_data_ptr<int32_t>(), rank, delta.rank.numel(), delta.u.size(0));
    const int32_t* v_start = delta.v_start.const_data_ptr<int32_t>();
    if (delta.pivots.has_value()) {
      check_stored_elements(op, delta, v_start, rank);
    } else {
      check_slices(op, delta_name("delta_v_start", index), delta_name("delta_v", index), v_start, rank,
                   delta.rank.numel(), delta.v.size(0));
    }
    check_full_rank(op, delta, rank);
  }
}

void check_pivots(const Delta& delta, int64_t expert) {
  const int64_t rank = delta.rank_of(expert);
  const int32_t* pivots = delta.pivots_of(expert);
  int64_t next = 0;
  for (int64_t i = 0; i < rank; ++i) {
    TORCH_CHECK(pivots[i] >= next && pivots[i] < delta.in_features(), delta.op, ": ",
                delta_name("delta_pivots", delta.index), " must ascend from 0 to ", delta.in_features() - 1,
                " within an expert, got ", pivots[i], " for expert ", expert);
    next = pivots[i] + 1;
  }
}

kernels::Activation parse_activation(const char* op, std::string_view activation) {
  if (activation == "silu") return kernels::Activation::kSilu;
  if (activation == "gelu") return kernels::Activation::kGelu;
  if (activation == "gelu_tanh") return kernels::Activation::kGeluTanh;
  if (activation == "relu2") return kernels::Activation::kRelu2;
  TORCH_CHECK(false, op, ": activation must be silu, gelu, gelu_tanh or relu2, got ", activation);
}

}  // namespace d2moe

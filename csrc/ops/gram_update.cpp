// Adds a batch of rows to a Gram matrix:
//
//   gram += X^T diag(w) X        gram [n, n], X = hidden_states [T, n], w = row_weights [T] (ones if not given)
//
// One triangle is computed, strip by strip, and mirrored: about half the work of the full product.
#include "ops/gram_update.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>

#include "kernels/gram_update.h"
#include "ops/checks.h"
#include "ops/element_type.h"

namespace d2moe {

namespace {

constexpr const char* kOp = "gram_update_";
// Width of a strip of the triangle. Narrower ones waste less above the diagonal, wider ones suit the matrix product.
constexpr int64_t kStrip = 512;
constexpr int64_t kChunkElements = 1 << 23;  // of X converted to the Gram's dtype at a time: 32 MB in float32

void gram_update_cpu(at::Tensor& gram, const at::Tensor& hidden_states, const std::optional<at::Tensor>& row_weights) {
  const at::AutoDispatchBelowAutograd guard;
  check_gram_update(gram, hidden_states, row_weights);
  const int64_t num_tokens = hidden_states.size(0), n = hidden_states.size(1);
  if (num_tokens == 0 || n == 0) {
    return;
  }
  const int64_t chunk = std::max<int64_t>(1, kChunkElements / n);
  for (int64_t first = 0; first < num_tokens; first += chunk) {
    const int64_t last = std::min(first + chunk, num_tokens);
    const at::Tensor x = hidden_states.slice(0, first, last).to(gram.scalar_type());
    const at::Tensor weighted =
        row_weights.has_value() ? x * row_weights->slice(0, first, last).to(gram.scalar_type()).unsqueeze(1) : x;
    for (int64_t begin = 0; begin < n; begin += kStrip) {
      const int64_t end = std::min(begin + kStrip, n);
      gram.slice(0, begin, end).slice(1, 0, end).addmm_(weighted.slice(1, begin, end).t(), x.slice(1, 0, end));
    }
  }
  // Tile rows grow in length, so each thread takes several.
  at::parallel_for(0, kernels::mirror_tiles(n), 4, [&](int64_t begin, int64_t end) {
    kernels::mirror_lower_triangle(gram.data_ptr(), element_type(gram), n, gram.stride(0), gram.stride(1), begin, end);
  });
}

}  // namespace

void check_gram_update(const at::Tensor& gram, const at::Tensor& hidden_states,
                       const std::optional<at::Tensor>& row_weights) {
  D2MOE_CHECK_DIM(kOp, hidden_states, 2);
  const int64_t num_tokens = hidden_states.size(0), n = hidden_states.size(1);
  D2MOE_CHECK_SHAPE(kOp, gram, n, n);
  TORCH_CHECK(is_compression_dtype(gram.scalar_type()), kOp, ": gram must be float32 or float64, got ",
              gram.scalar_type());
  TORCH_CHECK(is_float_dtype(hidden_states.scalar_type()), kOp, ": hidden_states must be of a floating dtype, got ",
              hidden_states.scalar_type());
  D2MOE_CHECK_DEVICE(kOp, hidden_states, gram);
  if (row_weights.has_value()) {
    TORCH_CHECK(row_weights->sizes() == at::IntArrayRef({num_tokens}), kOp, ": row_weights must have shape ",
                at::IntArrayRef({num_tokens}), ", got ", row_weights->sizes());
    TORCH_CHECK(is_float_dtype(row_weights->scalar_type()), kOp, ": row_weights must be of a floating dtype, got ",
                row_weights->scalar_type());
    TORCH_CHECK(row_weights->device() == gram.device(), kOp, ": row_weights must be on ", gram.device(),
                " like gram, got ", row_weights->device());
  }
}

TORCH_LIBRARY_FRAGMENT(d2moe_ext, m) {
  m.def("gram_update_(Tensor(a!) gram, Tensor hidden_states, Tensor? row_weights=None) -> ()");
}

TORCH_LIBRARY_IMPL(d2moe_ext, CPU, m) { m.impl("gram_update_", &gram_update_cpu); }

}  // namespace d2moe

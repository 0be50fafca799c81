// whitened_svd on a GPU: the method of whitened_svd.cpp over a chunk of the stack at a time, b entries in each call.
// With q = min(m, n), p = max(m, n), `inner` the Gram of q's side and `outer` that of p's, delta [b, p, q]:
//
//   S S^T = inner              cuSOLVER, again for those entries that need more ridge
//   A = delta S                [b, p, q], cuBLAS
//   A^T outer A = W^T s^2 W    [b, q, q], by blocks of outer's rows; cuSOLVER
//   tall = A W_r^T             [b, p, r]
//   wide = W_r S^-1            [b, r, q]
//
// The host waits once a stage, for what it must look at: diagonals, which entries have no factor, eigenvalues below 0.
// Chunks keep the scratch below kMostBuffers + kMostWorkspace, unless one entry alone needs more. Not yet run on a GPU.
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/batched_linalg_cuda.h"
#include "ops/cuda_context.h"
#include "ops/whitened_svd.h"

namespace d2moe {

namespace {

using namespace whitened;
using kernels::BatchedLinalg;

// Not measured yet.
#ifdef D2MOE_EMULATED
constexpr double kMostBuffers = 64 << 10;  // so that tests see several chunks, and parts of one
constexpr size_t kMostWorkspace = 512;
#else
constexpr double kMostBuffers = 3.0 * (1 << 30);
constexpr size_t kMostWorkspace = size_t{1} << 30;  // of the eigensolver
#endif
constexpr int64_t kMostEntries = 16384;  // in one call of a library

std::vector<double> on_host(const at::Tensor& values) {
  const at::Tensor copy = values.to(at::kCPU, at::kDouble).contiguous();
  return {copy.const_data_ptr<double>(), copy.const_data_ptr<double>() + copy.numel()};
}

at::Tensor on_device(const std::vector<double>& values, const at::Tensor& like) {
  return at::tensor(values, at::kDouble).to(like.device());
}

at::Tensor scratch(size_t bytes, const at::Tensor& like) {
  return at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
}

// [b] -> [b, 1, 1]
at::Tensor by_entry(const at::Tensor& values) { return values.unsqueeze(1).unsqueeze(2); }

// The Grams of one side of b entries, each divided by its own 4^exponent so that no product of it can overflow. An
// all-zero one (no token was seen: every direction counts alike) is 0 with a ridge of 1 on a diagonal of 1.
struct GramStack {
  const char* name;
  int64_t first;        // batch entry of the first one
  at::Tensor matrix;    // [b, n, n] as it was passed, not yet divided; undefined for diagonal ones or the identity
  at::Tensor scale;     // [b] float64: 4^-exponent, or 0
  at::Tensor diagonal;  // [b, n] float64; undefined for the identity
  at::Tensor ridge_diagonal;  // [b, n] float64: the diagonal, with its smallest positive value where it is 0
  std::vector<int> exponent;  // [b]
  std::vector<bool> seen;     // [b]
  std::vector<double> ridge;  // [b]
};

GramStack gram_stack(const char* name, const std::optional<at::Tensor>& gram, int64_t first, int64_t count,
                     double ridge) {
  GramStack side{name, first, {}, {}, {}, {}, std::vector<int>(count), std::vector<bool>(count), {}};
  side.ridge.assign(count, 1.0);
  if (!gram.has_value()) {
    return side;
  }
  const at::Tensor stored = gram->slice(0, first, first + count);
  const at::Tensor diagonal = (stored.dim() == 3 ? stored.diagonal(0, 1, 2) : stored).to(at::kDouble);
  const std::vector<double> extremes = on_host(at::stack({diagonal.amin(1), diagonal.amax(1)}));
  std::vector<double> scale(count, 0.0);
  for (int64_t entry = 0; entry < count; ++entry) {
    const double largest = extremes[count + entry];
    check_diagonal(name, extremes[entry], first + entry);
    if (largest > 0) {
      side.exponent[entry] = half_exponent(largest);
      side.seen[entry] = true;
      side.ridge[entry] = ridge;
      scale[entry] = std::ldexp(1.0, -2 * side.exponent[entry]);
    }
  }
  if (std::none_of(side.seen.begin(), side.seen.end(), [](bool seen) { return seen; })) {
    return side;
  }
  side.scale = on_device(scale, diagonal);
  side.diagonal = diagonal * side.scale.unsqueeze(1);
  const at::Tensor present = side.diagonal > 0;
  const double infinity = std::numeric_limits<double>::infinity();
  const at::Tensor smallest = at::where(present, side.diagonal, infinity).amin(1, /*keepdim=*/true);
  side.ridge_diagonal = at::where(present, side.diagonal, at::where(smallest.isfinite(), smallest, 1.0));
  if (stored.dim() == 3) {
    side.matrix = stored;
  }
  return side;
}

// What the ridge adds, [b, n].
at::Tensor ridge_term(const GramStack& side) {
  return side.ridge_diagonal * on_device(side.ridge, side.diagonal).unsqueeze(1);
}

// Rows [begin, end) of every Gram without its ridge, float64, scaled.
at::Tensor scaled_rows(const GramStack& side, int64_t begin, int64_t end) {
  const at::Tensor rows = side.matrix.slice(1, begin, end);
  return rows.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true).mul_(by_entry(side.scale));
}

// The ridged Grams of all entries, or of those in `entries`, contiguous.
at::Tensor ridged(const GramStack& side, const at::Tensor& entries) {
  const auto chosen = [&](const at::Tensor& values) {
    return entries.defined() ? values.index_select(0, entries) : values;
  };
  at::Tensor grams = at::empty(chosen(side.matrix).sizes(), side.diagonal.options());
  grams.copy_(chosen(side.matrix)).mul_(by_entry(chosen(side.scale)));
  grams.diagonal(0, 1, 2).copy_(chosen(side.diagonal + ridge_term(side)));
  return grams;
}

// Lower triangular factors in place, [b, n, n]; returns which have none.
std::vector<int64_t> factor_in_place(at::Tensor& grams, BatchedLinalg& library) {
  const int64_t count = grams.size(0), n = grams.size(1);
  const at::Tensor info = at::zeros({count}, grams.options().dtype(at::kInt));
  const size_t bytes = library.factor_workspace(grams.data_ptr<double>(), n, count);
  const at::Tensor workspace = scratch(bytes, grams);
  library.factor(grams.data_ptr<double>(), n, count, info.data_ptr<int>(), workspace.data_ptr(), bytes);
  const std::vector<double> failed = on_host(info);
  std::vector<int64_t> without;
  for (int64_t entry = 0; entry < count; ++entry) {
    if (failed[entry] != 0) {
      without.push_back(entry);
    }
  }
  return without;
}

// S with S S^T = G + ridge * diag(d): lower triangular [b, n, n], or [b, n] for diagonal Grams; undefined for the
// identity. The ridges in `side` become those that were needed.
at::Tensor factor(GramStack& side, BatchedLinalg& library) {
  if (!side.diagonal.defined()) {
    return {};
  }
  if (!side.matrix.defined()) {
    return (side.diagonal + ridge_term(side)).sqrt();
  }
  at::Tensor factors = ridged(side, {});
  std::vector<int64_t> without = factor_in_place(factors, library);
  for (int raises = 0; !without.empty(); ++raises) {
    if (raises == kMostRidgeRaises) {
      refuse_without_factor(side.name, side.ridge[without[0]], side.first + without[0]);
    }
    for (const int64_t entry : without) {
      side.ridge[entry] *= 10;
    }
    const at::Tensor entries = at::tensor(without, at::kLong).to(factors.device());
    at::Tensor again = ridged(side, entries);
    const std::vector<int64_t> still = factor_in_place(again, library);
    factors.index_copy_(0, entries, again);
    std::vector<int64_t> left;
    for (const int64_t position : still) {
      left.push_back(without[position]);
    }
    without = left;
  }
  return factors.tril_();
}

// A^T (G + ridge * diag(d)) A for A [b, p, q] -> [b, q, q]. Grams that are not positive semi-definite show here as an
// eigenvalue that the largest allowed ridge would not lift to 0; `negative_allowance` [b] is that bound.
at::Tensor gram_product(const at::Tensor& a, const GramStack& side, at::Tensor& negative_allowance) {
  const double infinity = std::numeric_limits<double>::infinity();
  negative_allowance = at::full({a.size(0)}, infinity, a.options());
  if (!side.diagonal.defined()) {
    return at::bmm(a.mT(), a);
  }
  if (!side.matrix.defined()) {
    return at::bmm(a.mT(), a * (side.diagonal + ridge_term(side)).unsqueeze(2));
  }
  const at::Tensor ridges = by_entry(on_device(side.ridge, a));
  at::Tensor product = at::zeros({a.size(0), a.size(2), a.size(2)}, a.options());
  at::Tensor ridge_energy = at::zeros({a.size(0)}, a.options());
  for (int64_t begin = 0; begin < a.size(1); begin += kGramBlockRows) {
    const int64_t end = std::min(begin + kGramBlockRows, a.size(1));
    const at::Tensor a_rows = a.slice(1, begin, end);
    const at::Tensor ridge_rows = a_rows * side.ridge_diagonal.slice(1, begin, end).unsqueeze(2);
    ridge_energy += (ridge_rows * a_rows).sum({1, 2});
    const at::Tensor gram_rows = at::bmm(scaled_rows(side, begin, end), a).addcmul_(ridge_rows, ridges);
    product.baddbmm_(a_rows.mT(), gram_rows);
  }
  negative_allowance = (ridges.flatten() * kMostRidgeGrowth + 1e-9) * ridge_energy;
  return product;
}

// Eigenvalues [b, q], ascending; `symmetric` [b, q, q] becomes the eigenvectors, row by row, or scratch.
at::Tensor eigen_in_place(at::Tensor& symmetric, bool vectors, BatchedLinalg& library, int64_t first) {
  const int64_t count = symmetric.size(0), q = symmetric.size(1);
  const at::Tensor values = at::empty({count, q}, symmetric.options());
  const at::Tensor info = at::zeros({count}, symmetric.options().dtype(at::kInt));
  auto* const matrix = symmetric.data_ptr<double>();
  auto* const value = values.data_ptr<double>();
  const auto bytes_of = [&](int64_t entries) { return library.eigen_workspace(vectors, matrix, q, entries, value); };
  int64_t at_a_time = count;
  while (at_a_time > 1 && bytes_of(at_a_time) > kMostWorkspace) {
    at_a_time = (at_a_time + 1) / 2;
  }
  const size_t bytes = bytes_of(at_a_time);
  const at::Tensor workspace = scratch(bytes, symmetric);
  for (int64_t begin = 0; begin < count; begin += at_a_time) {
    library.eigen(vectors, matrix + begin * q * q, q, std::min(at_a_time, count - begin), value + begin * q,
                  info.data_ptr<int>() + begin, workspace.data_ptr(), bytes);
  }
  const std::vector<double> failed = on_host(info);
  for (int64_t entry = 0; entry < count; ++entry) {
    TORCH_CHECK(failed[entry] == 0, kOp, ": the eigenvalues must converge, got ", failed[entry],
                " that did not in batch entry ", first + entry);
  }
  return values;
}

void check_eigenvalues(const at::Tensor& squares, const at::Tensor& negative_allowance, const GramStack& outer) {
  const int64_t count = squares.size(0);
  const std::vector<double> values = on_host(at::stack({squares.select(1, 0), negative_allowance}));
  for (int64_t entry = 0; entry < count; ++entry) {
    if (!(values[entry] >= -values[count + entry])) {  // NaN too
      refuse_negative_eigenvalue(outer.name, outer.ridge[entry], outer.first + entry);
    }
  }
}

// W S^-1 for rows [b, r, q], in place where S has more than a diagonal.
at::Tensor undo_factor(const at::Tensor& s, at::Tensor rows, BatchedLinalg& library) {
  if (!s.defined()) {
    return rows;
  }
  if (s.dim() == 2) {
    return rows / s.unsqueeze(1);
  }
  const int64_t count = rows.size(0), r = rows.size(1), q = rows.size(2);
  const at::Tensor workspace = scratch(BatchedLinalg::solve_workspace(q, count), rows);
  library.solve(s.const_data_ptr<double>(), rows.data_ptr<double>(), q, r, count, workspace.data_ptr());
  return rows;
}

struct Factors {
  at::Tensor tall;             // [b, p, rank]
  at::Tensor wide;             // [b, rank, q]
  at::Tensor singular_values;  // [b, q]
};

// delta [b, p, q] float64 with q <= p, which this may overwrite.
Factors decompose(at::Tensor delta, GramStack& inner, const GramStack& outer, int64_t rank, BatchedLinalg& library) {
  const int64_t count = delta.size(0), q = delta.size(2);
  const std::vector<double> extremes = on_host(at::stack({delta.amin({1, 2}), delta.amax({1, 2})}));
  std::vector<double> down(count), half_up(count), sigma_up(count);
  for (int64_t entry = 0; entry < count; ++entry) {
    const int exponent = half_exponent(std::max(-extremes[entry], extremes[count + entry]));
    down[entry] = std::ldexp(1.0, -2 * exponent);
    half_up[entry] = std::ldexp(1.0, exponent);
    sigma_up[entry] = std::ldexp(1.0, 2 * exponent + inner.exponent[entry] + outer.exponent[entry]);
  }
  delta.mul_(by_entry(on_device(down, delta)));
  const at::Tensor s = factor(inner, library);
  const at::Tensor a = !s.defined() ? delta : s.dim() == 2 ? delta.mul_(s.unsqueeze(1)) : at::bmm(delta, s);
  delta.reset();
  at::Tensor negative_allowance;
  at::Tensor product = gram_product(a, outer, negative_allowance);
  const at::Tensor squares = eigen_in_place(product, rank > 0, library, inner.first);
  check_eigenvalues(squares, negative_allowance, outer);
  Factors factors;
  factors.singular_values = squares.flip(1).clamp_min_(0).sqrt_().mul_(on_device(sigma_up, a).unsqueeze(1));
  if (rank > 0) {
    const at::Tensor rows = product.slice(1, q - rank).flip(1).contiguous();
    product.reset();
    factors.tall = at::bmm(a, rows.mT());
    factors.wide = undo_factor(s, rows, library);
    balance(factors.tall, factors.wide, on_device(half_up, a).unsqueeze(1));
  }
  return factors;
}

// How many entries may be worked on together, by the tensors that decompose() holds at its fullest.
int64_t entries_at_a_time(int64_t p, int64_t q) {
  const double block_rows = std::min<double>(p, kGramBlockRows);
  const double bytes = sizeof(double) * (5.0 * p * q + 7.0 * q * q + block_rows * (p + 3.0 * q));
  return std::clamp<int64_t>(static_cast<int64_t>(kMostBuffers / bytes), 1, kMostEntries);
}

Results whitened_svd_cuda(const at::Tensor& delta, int64_t rank, const std::optional<at::Tensor>& gram,
                          const std::optional<at::Tensor>& left_gram, double ridge, double left_ridge) {
  const at::AutoDispatchBelowAutograd guard;
  check_arguments(delta, rank, gram, left_gram, ridge, left_ridge);  // first: delta may be the one on another device
  const CudaContext context(delta);
  const int64_t batch = delta.size(0), m = delta.size(1), n = delta.size(2);
  const Results results = empty_results(delta, rank);
  const at::Tensor &u = std::get<0>(results), &v = std::get<1>(results);
  const at::Tensor &singular_values = std::get<2>(results), &ridge_used = std::get<3>(results);
  if (delta.numel() == 0) {
    return results;
  }
  try {
    BatchedLinalg library(static_cast<int>(delta.get_device()), context.stream());
    const int64_t chunk = entries_at_a_time(std::max(m, n), std::min(m, n));
    for (int64_t first = 0; first < batch; first += chunk) {
      const int64_t count = std::min(chunk, batch - first);
      GramStack right = gram_stack("gram", gram, first, count, ridge);
      GramStack left = gram_stack("left_gram", left_gram, first, count, left_ridge);
      at::Tensor matrices = delta.slice(0, first, first + count).to(at::kDouble, /*non_blocking=*/false, /*copy=*/true);
      if (m < n) {
        matrices = matrices.mT();
      }
      GramStack& inner = n <= m ? right : left;
      const Factors factors = decompose(std::move(matrices), inner, n <= m ? left : right, rank, library);
      const auto of_chunk = [&](const at::Tensor& result) { return result.slice(0, first, first + count); };
      of_chunk(singular_values).copy_(factors.singular_values);
      std::vector<double> used(count);
      std::transform(right.ridge.begin(), right.ridge.end(), right.seen.begin(), used.begin(),
                     [](double value, bool seen) { return seen ? value : 0.0; });
      of_chunk(ridge_used).copy_(on_device(used, delta));
      if (rank > 0) {
        of_chunk(u).copy_(n <= m ? factors.tall : factors.wide.mT());
        of_chunk(v).copy_(n <= m ? factors.wide : factors.tall.mT());
      }
    }
  } catch (const kernels::LibraryError& error) {
    TORCH_CHECK(false, kOp, ": ", error.what());
  }
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(d2moe_ext, D2MOE_CUDA_KEY, m) { m.impl("whitened_svd", &whitened_svd_cuda); }

}  // namespace d2moe

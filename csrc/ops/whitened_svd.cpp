// The best rank-r approximation of delta in the norm of the data it meets (design 2.5, paper eqs. 6-8):
//
//   minimise ||L^T (delta - u v) S||_F,   S S^T = G (gram and its ridge),   L L^T = B (left_gram and its ridge)
//
//   delta [B, m, n], gram [B, n, n] or [B, n], left_gram [B, m, m] or [B, m] -> u [B, m, rank], v [B, rank, n]
//
// The singular vectors of A = L^T delta S come from the smaller of its two Gram matrices, [q, q] with q = min(m, n):
// only the Gram of that side is factored, the other one enters by products alone. The case m < n is the case m >= n of
// the transpose (delta^T, with gram and left_gram changing places), so one function does both:
//
//   n <= m:  V of S^T delta^T B delta S,   u = delta S V_r,        v = V_r^T S^-1
//   m <  n:  Q of L^T delta G delta^T L,   u = L^-T Q_r,           v = Q_r^T L^T delta
#include "ops/whitened_svd.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/linalg_eigvalsh.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "ops/checks.h"

namespace d2moe {

namespace whitened {

namespace {

void check_gram(const char* name, const std::optional<at::Tensor>& gram, const at::Tensor& delta, int64_t size) {
  if (!gram.has_value()) {
    return;
  }
  const int64_t batch = delta.size(0);
  const bool diagonal = gram->sizes() == at::IntArrayRef({batch, size});
  const bool full = gram->sizes() == at::IntArrayRef({batch, size, size});
  TORCH_CHECK(diagonal || full, kOp, ": ", name, " must have shape ", at::IntArrayRef({batch, size, size}), " or ",
              at::IntArrayRef({batch, size}), ", got ", gram->sizes());
  TORCH_CHECK(is_compression_dtype(gram->scalar_type()), kOp, ": ", name, " must be float32 or float64, got ",
              gram->scalar_type());
  TORCH_CHECK(gram->device() == delta.device(), kOp, ": ", name, " must be on ", delta.device(), " like delta, got ",
              gram->device());
}

// The least and the largest of an entry are finite where all of it is, and take no memory of its size.
void check_finite(const char* name, const std::optional<at::Tensor>& tensor) {
  if (!tensor.has_value() || tensor->numel() == 0) {
    return;
  }
  std::vector<int64_t> dims(tensor->dim() - 1);
  std::iota(dims.begin(), dims.end(), 1);
  const at::Tensor extremes = at::stack({tensor->amin(dims), tensor->amax(dims)}, 1);
  const at::Tensor finite = at::isfinite(extremes).all(1).cpu();
  for (int64_t entry = 0; entry < finite.size(0); ++entry) {
    if (!finite.const_data_ptr<bool>()[entry]) {
      const at::Tensor values = tensor->select(0, entry);
      const double first = values.masked_select(at::isfinite(values).logical_not())[0].item<double>();
      TORCH_CHECK(false, kOp, ": ", name, " must be finite, got ", first, " in batch entry ", entry);
    }
  }
}

}  // namespace

void check_arguments(const at::Tensor& delta, int64_t rank, const std::optional<at::Tensor>& gram,
                     const std::optional<at::Tensor>& left_gram, double ridge, double left_ridge) {
  D2MOE_CHECK_DIM(kOp, delta, 3);
  TORCH_CHECK(is_compression_dtype(delta.scalar_type()), kOp, ": delta must be float32 or float64, got ",
              delta.scalar_type());
  const int64_t smaller = std::min(delta.size(1), delta.size(2));
  TORCH_CHECK(0 <= rank && rank <= smaller, kOp, ": rank must be between 0 and min(m, n) = ", smaller, ", got ", rank);
  TORCH_CHECK(ridge >= 0 && std::isfinite(ridge), kOp, ": ridge must be finite and not negative, got ", ridge);
  TORCH_CHECK(left_ridge >= 0 && std::isfinite(left_ridge), kOp, ": left_ridge must be finite and not negative, got ",
              left_ridge);
  check_gram("gram", gram, delta, delta.size(2));
  check_gram("left_gram", left_gram, delta, delta.size(1));
  check_finite("delta", delta);
  check_finite("gram", gram);
  check_finite("left_gram", left_gram);
}

void check_diagonal(const char* name, double smallest, int64_t entry) {
  TORCH_CHECK(smallest >= 0, kOp, ": ", name, " must have a non-negative diagonal, got ", smallest, " in batch entry ",
              entry);
}

void refuse_without_factor(const char* name, double ridge, int64_t entry) {
  TORCH_CHECK(false, kOp, ": ", name, " must be positive semi-definite up to a ridge of ", ridge,
              " times its diagonal, got a matrix without a Cholesky factor in batch entry ", entry);
}

void refuse_negative_eigenvalue(const char* name, double ridge, int64_t entry) {
  TORCH_CHECK(false, kOp, ": ", name, " must be positive semi-definite up to a ridge of ", kMostRidgeGrowth * ridge,
              " times its diagonal, got a matrix with a negative eigenvalue in batch entry ", entry);
}

Results empty_results(const at::Tensor& delta, int64_t rank) {
  const int64_t batch = delta.size(0), m = delta.size(1), n = delta.size(2);
  const at::TensorOptions doubles = delta.options().dtype(at::kDouble);
  return {at::empty({batch, m, rank}, delta.options()), at::empty({batch, rank, n}, delta.options()),
          at::empty({batch, std::min(m, n)}, doubles), at::zeros({batch}, doubles)};
}

int half_exponent(double largest) {
  int exponent = 0;
  std::frexp(largest, &exponent);
  return std::clamp(exponent / 2, -500, 500);
}

void balance(at::Tensor& tall, at::Tensor& wide, const at::Tensor& magnitude) {
  const at::Tensor tall_size = tall.abs().amax(-2);
  const at::Tensor wide_size = wide.abs().amax(-1);
  const at::Tensor ratio = (wide_size / tall_size).sqrt();
  const at::Tensor present = (tall_size > 0) & (wide_size > 0) & ratio.isfinite() & (ratio > 0);
  const at::Tensor scale = at::where(present, ratio, 1.0);
  const at::Tensor kept = present.to(at::kDouble) * magnitude;
  tall = tall * (scale * kept).unsqueeze(-2);
  wide = wide * (kept / scale).unsqueeze(-1);
}

}  // namespace whitened

namespace {

using namespace whitened;

constexpr double kMostParallelWorkspace = 4.0 * (1 << 30);

// The Gram of one side of one batch entry, divided by 4^exponent so that no product of it can overflow.
struct SideGram {
  const char* name;
  at::Tensor matrix;          // [n, n] as it was passed, not yet divided; undefined for a diagonal Gram or the identity
  at::Tensor diagonal;        // [n] float64; undefined for the identity
  at::Tensor ridge_diagonal;  // [n] float64: the diagonal, with its smallest positive value where it is 0
  int exponent = 0;
  double ridge = 0.0;
  int64_t entry = 0;
};

SideGram side_gram(const char* name, const std::optional<at::Tensor>& gram, int64_t entry, double ridge) {
  SideGram side;
  side.name = name;
  side.entry = entry;
  if (!gram.has_value()) {
    return side;
  }
  const at::Tensor stored = gram->select(0, entry);
  const at::Tensor diagonal = (stored.dim() == 2 ? stored.diagonal() : stored).to(at::kDouble);
  const double smallest = diagonal.min().item<double>();
  const double largest = diagonal.max().item<double>();
  check_diagonal(name, smallest, entry);
  if (largest == 0) {
    return side;  // no token was seen: every direction counts alike
  }
  side.exponent = half_exponent(largest);
  side.diagonal = diagonal * std::ldexp(1.0, -2 * side.exponent);
  const at::Tensor smallest_positive = side.diagonal.masked_select(side.diagonal > 0).min();
  side.ridge_diagonal = at::where(side.diagonal > 0, side.diagonal, smallest_positive);
  side.ridge = ridge;
  if (stored.dim() == 2) {
    side.matrix = stored;
  }
  return side;
}

// Rows [begin, end) of the ridged Gram without its ridge, float64, scaled.
at::Tensor scaled_rows(const SideGram& side, int64_t begin, int64_t end) {
  const at::Tensor rows = side.matrix.slice(0, begin, end).to(at::kDouble, /*non_blocking=*/false, /*copy=*/true);
  return rows.mul_(std::ldexp(1.0, -2 * side.exponent));
}

// S with S S^T = G + ridge * diag(d): lower triangular [n, n], or [n] for a diagonal Gram; undefined for the identity.
// The ridge in `side` becomes the one that was needed.
at::Tensor factor(SideGram& side) {
  if (!side.diagonal.defined()) {
    return {};
  }
  if (!side.matrix.defined()) {
    return (side.diagonal + side.ridge * side.ridge_diagonal).sqrt();
  }
  at::Tensor ridged = scaled_rows(side, 0, side.matrix.size(0));
  for (int raises = 0;; ++raises) {
    ridged.diagonal().copy_(side.diagonal + side.ridge * side.ridge_diagonal);
    const auto [lower, info] = at::linalg_cholesky_ex(ridged);
    if (info.item<int>() == 0) {
      return lower;
    }
    if (raises == kMostRidgeRaises) {
      refuse_without_factor(side.name, side.ridge, side.entry);
    }
    side.ridge *= 10;
  }
}

// A^T (G + ridge * diag(d)) A for A [p, q] -> [q, q]. A Gram that is not positive semi-definite shows here as an
// eigenvalue that the largest allowed ridge would not lift to 0; `negative_allowance` is that bound.
at::Tensor gram_product(const at::Tensor& a, const SideGram& side, double& negative_allowance) {
  const at::Tensor a_transposed = a.t();
  negative_allowance = std::numeric_limits<double>::infinity();
  if (!side.diagonal.defined()) {
    return at::matmul(a_transposed, a);
  }
  const at::Tensor ridge_diagonal = side.ridge_diagonal.unsqueeze(1);
  if (!side.matrix.defined()) {
    return at::matmul(a_transposed, a * (side.diagonal.unsqueeze(1) + side.ridge * ridge_diagonal));
  }
  at::Tensor product = at::zeros({a.size(1), a.size(1)}, a.options());
  double ridge_energy = 0;
  for (int64_t begin = 0; begin < a.size(0); begin += kGramBlockRows) {
    const int64_t end = std::min(begin + kGramBlockRows, a.size(0));
    const at::Tensor a_rows = a.slice(0, begin, end);
    const at::Tensor ridge_rows = a_rows * ridge_diagonal.slice(0, begin, end);
    ridge_energy += (ridge_rows * a_rows).sum().item<double>();
    const at::Tensor gram_rows = at::matmul(scaled_rows(side, begin, end), a).add_(ridge_rows, side.ridge);
    product.addmm_(a_rows.t(), gram_rows);
  }
  negative_allowance = (kMostRidgeGrowth * side.ridge + 1e-9) * ridge_energy;
  return product;
}

// Eigenvalues and, where rank > 0, the eigenvectors of its `rank` largest, both from the largest down.
std::tuple<at::Tensor, at::Tensor> largest_eigenvectors(const at::Tensor& symmetric, int64_t rank) {
  if (rank == 0) {
    return {at::linalg_eigvalsh(symmetric).flip(0), at::Tensor()};
  }
  const auto [values, vectors] = at::linalg_eigh(symmetric);
  return {values.flip(0), vectors.slice(1, vectors.size(1) - rank).flip(1)};
}

struct Factors {
  at::Tensor tall;             // [p, rank]
  at::Tensor wide;             // [rank, q]
  at::Tensor singular_values;  // [q]
};

// delta [p, q] float64 with q <= p; `inner` is the Gram of its q columns, `outer` of its p rows.
Factors decompose(at::Tensor delta, SideGram& inner, const SideGram& outer, int64_t rank) {
  const double largest = std::max(delta.max().item<double>(), -delta.min().item<double>());
  const int delta_exponent = half_exponent(largest);
  delta = delta * std::ldexp(1.0, -2 * delta_exponent);
  const at::Tensor s = factor(inner);
  const at::Tensor a = !s.defined() ? delta : s.dim() == 1 ? delta * s : at::matmul(delta, s);
  double negative_allowance = 0;
  const at::Tensor product = gram_product(a, outer, negative_allowance);
  const auto [squares, vectors] = largest_eigenvectors(product, rank);
  if (!(squares[-1].item<double>() >= -negative_allowance)) {  // NaN too
    refuse_negative_eigenvalue(outer.name, outer.ridge, outer.entry);
  }
  Factors factors;
  factors.singular_values =
      squares.clamp_min(0).sqrt().mul_(std::ldexp(1.0, 2 * delta_exponent + inner.exponent + outer.exponent));
  if (rank > 0) {
    factors.tall = at::matmul(a, vectors);
    const at::Tensor rows = vectors.t();
    factors.wide = !s.defined()   ? rows
                   : s.dim() == 1 ? rows / s
                                  : at::linalg_solve_triangular(s, rows, /*upper=*/false, /*left=*/false);
    balance(factors.tall, factors.wide, at::scalar_tensor(std::ldexp(1.0, delta_exponent), delta.options()));
  }
  return factors;
}

// Calls function(entry) for every batch entry: one thread to an entry where the workspace allows, since the eigensolver
// gains little from a second thread (and with a busy core loses twentyfold to its barriers: 1408 x 1408, 2 cores,
// 0.9 s alone and 19 s together); otherwise one entry after the other, each on all threads.
template <typename Function>
void for_each_entry(const at::Tensor& delta, Function&& function) {
  const int64_t batch = delta.size(0), p = std::max(delta.size(1), delta.size(2));
  const int64_t q = std::min(delta.size(1), delta.size(2));
  const double workspace = sizeof(double) * (5.0 * p * q + 6.0 * q * q + 2.0 * kGramBlockRows * p);
  const bool together = workspace * std::min<int64_t>(at::get_num_threads(), batch) <= kMostParallelWorkspace;
  std::vector<std::exception_ptr> errors(batch);  // so that the error raised is the first entry's, not the fastest's
  at::parallel_for(0, batch, together ? 1 : batch, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowAutograd guard;  // of this thread
    for (int64_t entry = begin; entry < end; ++entry) {
      try {
        function(entry);
      } catch (...) {
        errors[entry] = std::current_exception();
      }
    }
  });
  for (const std::exception_ptr& error : errors) {
    if (error) {
      std::rethrow_exception(error);
    }
  }
}

Results whitened_svd_cpu(const at::Tensor& delta, int64_t rank, const std::optional<at::Tensor>& gram,
                         const std::optional<at::Tensor>& left_gram, double ridge, double left_ridge) {
  const at::AutoDispatchBelowAutograd guard;
  check_arguments(delta, rank, gram, left_gram, ridge, left_ridge);
  const int64_t m = delta.size(1), n = delta.size(2);
  const Results results = empty_results(delta, rank);
  const at::Tensor &u = std::get<0>(results), &v = std::get<1>(results);
  const at::Tensor &singular_values = std::get<2>(results), &ridge_used = std::get<3>(results);
  if (delta.numel() == 0) {
    return results;
  }
  for_each_entry(delta, [&](int64_t entry) {
    SideGram right = side_gram("gram", gram, entry, ridge);
    SideGram left = side_gram("left_gram", left_gram, entry, left_ridge);
    const at::Tensor matrix = delta.select(0, entry).to(at::kDouble);
    const Factors factors = n <= m ? decompose(matrix, right, left, rank) : decompose(matrix.t(), left, right, rank);
    singular_values.select(0, entry).copy_(factors.singular_values);
    ridge_used.select(0, entry).fill_(right.ridge);
    if (rank > 0) {
      u.select(0, entry).copy_(n <= m ? factors.tall : factors.wide.t());
      v.select(0, entry).copy_(n <= m ? factors.wide : factors.tall.t());
    }
  });
  return results;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(d2moe_ext, m) {
  m.def(
      "whitened_svd(Tensor delta, int rank, Tensor? gram=None, Tensor? left_gram=None, float ridge=1e-6, "
      "float left_ridge=0.1) -> (Tensor u, Tensor v, Tensor singular_values, Tensor ridge_used)");
}

TORCH_LIBRARY_IMPL(d2moe_ext, CPU, m) { m.impl("whitened_svd", &whitened_svd_cpu); }

}  // namespace d2moe

#include "ops/matmul.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/mm.h>

#include <algorithm>

namespace d2moe {

namespace {

// Whether ATen multiplies the dtype with instructions of this CPU. Where it does not, it emulates them, and a float32
// product of converted chunks is faster as soon as a conversion serves several rows.
bool has_fast_matmul(at::ScalarType dtype) {
  if (dtype == at::kFloat) {
    return true;
  }
#if defined(__x86_64__) && defined(__GNUC__)
  return dtype == at::kBFloat16 && __builtin_cpu_supports("avx512bf16");
#else
  return dtype == at::kBFloat16;
#endif
}

// Converting pays between 1 row and 64. Measured with [rows, 2048] x [2048, 2816] on 2 busy cores of a Xeon with
// AVX-512 but without bfloat16 instructions, torch 2.13, milliseconds direct / converted: 1 row: bfloat16 4.2 / 9.9,
// float16 3.0 / 11; 64 rows: 43 / 35, 92 / 36; 512 rows: 273 / 91, 820 / 104.
constexpr int64_t kMinRowsToConvert = 16;
constexpr int64_t kRowsPerChunk = 1024;
constexpr int64_t kWeightsPerChunk = int64_t{1} << 21;  // 8 MiB of float32

void matmul_in_float32_chunks(const at::Tensor& out, const at::Tensor& left, const at::Tensor& right, bool add) {
  const int64_t columns_per_chunk = std::max<int64_t>(1, kWeightsPerChunk / right.size(0));
  for (int64_t row = 0; row < left.size(0); row += kRowsPerChunk) {
    const int64_t rows = std::min(kRowsPerChunk, left.size(0) - row);
    const at::Tensor left_chunk = left.narrow(0, row, rows).to(at::kFloat);
    for (int64_t column = 0; column < right.size(1); column += columns_per_chunk) {
      const int64_t columns = std::min(columns_per_chunk, right.size(1) - column);
      const at::Tensor right_chunk = right.narrow(1, column, columns).to(at::kFloat);
      const at::Tensor out_chunk = out.narrow(0, row, rows).narrow(1, column, columns);
      out_chunk.copy_(add ? out_chunk.to(at::kFloat).addmm_(left_chunk, right_chunk) : at::mm(left_chunk, right_chunk));
    }
  }
}

bool multiplies_directly(const at::Tensor& left) {
  return has_fast_matmul(left.scalar_type()) || left.size(0) < kMinRowsToConvert;
}

}  // namespace

void matmul_out(const at::Tensor& out, const at::Tensor& left, const at::Tensor& right) {
  if (out.numel() == 0) {
    return;
  }
  if (left.size(1) == 0) {
    out.zero_();
    return;
  }
  if (multiplies_directly(left)) {
    at::Tensor result = out;
    at::mm_out(result, left, right);
  } else {
    matmul_in_float32_chunks(out, left, right, false);
  }
}

void matmul_add(const at::Tensor& out, const at::Tensor& left, const at::Tensor& right) {
  if (out.numel() == 0 || left.size(1) == 0) {
    return;
  }
  if (multiplies_directly(left)) {
    out.addmm_(left, right);
  } else {
    matmul_in_float32_chunks(out, left, right, true);
  }
}

}  // namespace d2moe

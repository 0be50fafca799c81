#include <type_traits>

#include "kernels/product_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

#if !defined(__clang__)
// GCC 12 takes the undefined vectors of its own intrinsics for a mistake of ours.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif

#include "kernels/product_kernels_avx512.h"
#include "kernels/product_loops.h"

namespace d2moe::kernels {

const ProductKernels* product_kernels_avx512(ElementType weights) {
  static const ProductKernels of_float = kernels_of<Avx512<float>>("avx512", ElementType::kFloat32);
  static const ProductKernels of_bfloat16 = kernels_of<Avx512<BFloat16>>("avx512", ElementType::kFloat32);
  static const ProductKernels of_float16 = kernels_of<Avx512<Float16>>("avx512", ElementType::kFloat32);
  switch (weights) {
    case ElementType::kBFloat16:
      return &of_bfloat16;
    case ElementType::kFloat16:
      return &of_float16;
    default:
      return &of_float;
  }
}

}  // namespace d2moe::kernels

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace d2moe::kernels {
const ProductKernels* product_kernels_avx512(ElementType) { return nullptr; }
}  // namespace d2moe::kernels

#endif

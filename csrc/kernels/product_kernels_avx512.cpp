#include <type_traits>

#include "kernels/product_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include "kernels/x86_intrinsics.h"

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
  return float32_kernels_for<Avx512>("avx512", weights);
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

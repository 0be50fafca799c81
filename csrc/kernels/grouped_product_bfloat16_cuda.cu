#include "kernels/grouped_product.cuh"

namespace d2moe::kernels {

cudaError_t launch_bfloat16_product(const ProductArguments& arguments, const ProductGrid& grid, cudaStream_t stream) {
  const auto launch_it =
      grid.many_rows ? &launch_product_with<ManyRows<__nv_bfloat16>> : &launch_product_with<FewRows<__nv_bfloat16>>;
  return launch_it(arguments, grid, stream);
}

}  // namespace d2moe::kernels

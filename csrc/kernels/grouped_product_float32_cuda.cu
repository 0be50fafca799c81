#include "kernels/grouped_product.cuh"

namespace d2moe::kernels {

cudaError_t launch_float32_product(const ProductArguments& arguments, const ProductGrid& grid, cudaStream_t stream) {
  const auto launch_it = grid.many_rows ? &launch_product_with<ManyFloatRows> : &launch_product_with<FewFloatRows>;
  return launch_it(arguments, grid, stream);
}

}  // namespace d2moe::kernels

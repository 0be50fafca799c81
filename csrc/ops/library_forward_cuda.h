// An uncompressed layer by torch's own grouped products, where the GPU has them and arithmetic bounds: nothing that is
// compiled for all GPUs comes near them there.
#pragma once

#include "ops/moe_forward_plan.h"
#include "ops/moe_products_cuda.h"

namespace d2moe {

// Whether they serve these pairs and bases; rows of both are pairs, and there are no deltas.
bool library_forward_serves(const PairsCall& call, const BaseGroup& gate_up, const kernels::BaseRows& gate_up_rows,
                            const BaseGroup& down, const kernels::BaseRows& down_rows);

struct LayerActivation {
  kernels::Activation activation;
  bool gated, interleaved;
};

// x [T, H] and router weights [T * k] float32 -> [T, H].
at::Tensor library_forward(PairsCall& call, const BaseGroup& gate_up, const kernels::BaseRows& gate_up_rows,
                           const BaseGroup& down, const kernels::BaseRows& down_rows, const at::Tensor& x,
                           const at::Tensor& weights, const LayerActivation& activation);

}  // namespace d2moe

// The Autograd kernel of the operators without a backward: it raises where a gradient would be needed, because silently
// returning a result that is cut off from the graph is what every user of it would find out last.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>

namespace d2moe {

namespace {

bool requires_grad(const c10::IValue& argument) {
  if (argument.isTensor()) {
    return argument.toTensor().defined() && argument.toTensor().requires_grad();
  }
  if (argument.isTensorList()) {
    const std::vector<at::Tensor> tensors = argument.toTensorVector();
    return std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor& tensor) { return tensor.requires_grad(); });
  }
  return false;
}

void inference_only(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  if (c10::GradMode::is_enabled()) {
    for (size_t i = 0; i < arguments.size(); ++i) {
      const std::string& name = op.schema().name();
      TORCH_CHECK(!requires_grad(torch::jit::peek(*stack, i, arguments.size())), name.substr(name.rfind(':') + 1), ": ",
                  arguments[i].name(),
                  " must not require grad in grad mode, because this operator is for inference (use torch.no_grad() or "
                  "unpatch_model), got requires_grad=True");
    }
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(d2moe_ext, Autograd, m) {
  for (const char* name : {"moe_forward", "moe_gate_up_forward", "moe_down_forward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&inference_only>());
  }
}

}  // namespace d2moe

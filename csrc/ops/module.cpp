// The Python module `d2moe_ext._C`. Importing it registers the operators of torch.ops.d2moe_ext;
// each operator's schema and implementations stand in the file of its name.
#include <pybind11/pybind11.h>

#include <string>

#include "d2moe_build_info.h"
#include "kernels/product_kernels.h"

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["source_hash"] = D2MOE_SOURCE_HASH;
  info["torch_version"] = D2MOE_TORCH_VERSION;
#ifdef D2MOE_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

pybind11::list instruction_sets() {
  pybind11::list names;
  for (const char* const* name = d2moe::kernels::instruction_sets(); *name != nullptr; ++name) {
    names.append(*name);
  }
  return names;
}

void use_instruction_set(const std::string& name) {
  if (!d2moe::kernels::use_instruction_set(name.c_str())) {
    throw pybind11::value_error("use_instruction_set: name must be one of instruction_sets(), got '" + name + "'");
  }
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Native operators of d2moe_ext.";
  m.def("build_info", &build_info,
        "The source hash, the torch version it was built against, and whether CUDA and OpenMP are in.");
  m.def("instruction_sets", &instruction_sets, "Those of this CPU that there are products for, fastest first.");
  m.def("use_instruction_set", &use_instruction_set,
        "For tests and benchmarks: multiply with another one than the fastest. Not while an operator runs.");
}

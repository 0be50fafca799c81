// The Python module `d2moe_ext._C`. Importing it registers the operators of torch.ops.d2moe_ext;
// each operator's schema and implementations stand in the file of its name.
#include <pybind11/pybind11.h>

#include "d2moe_build_info.h"

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

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Native operators of d2moe_ext.";
  m.def("build_info", &build_info,
        "The source hash, the torch version it was built against, and whether CUDA and OpenMP are in.");
}

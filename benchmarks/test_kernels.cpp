// ctest's: every product kernel against a plain loop in float64, and the list of instruction sets.
#include <cstdio>

#include "benchmarks/kernel_cases.h"

int main() {
  using namespace d2moe::kernels;
  if (use_instruction_set("none") || product_kernels("none", ElementType::kFloat32) != nullptr) {
    std::fprintf(stderr, "an instruction set that there is not was taken\n");
    return 1;
  }
  for (const char* const* set = instruction_sets(); *set != nullptr; ++set) {
    if (!use_instruction_set(*set) || product_kernels(ElementType::kFloat32).instruction_set != *set) {
      std::fprintf(stderr, "%s was not taken\n", *set);
      return 1;
    }
    std::printf("%s\n", *set);
  }
  return cases::validate() ? 0 : 1;
}

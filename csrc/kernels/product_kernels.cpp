#include "kernels/product_kernels.h"

#include <cstring>

namespace d2moe::kernels {

namespace {

struct InstructionSet {
  const char* name;
  bool available;
  const ProductKernels* (*kernels)(ElementType);
};

#if defined(__x86_64__) && defined(__GNUC__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#else
bool has_avx512() { return false; }
bool has_avx512_bf16() { return false; }
bool has_avx2() { return false; }
#endif

constexpr int kNumSets = 4;

const InstructionSet* known_sets() {
  static const InstructionSet sets[kNumSets] = {{"avx512_bf16", has_avx512_bf16(), &product_kernels_avx512_bf16},
                                                {"avx512", has_avx512(), &product_kernels_avx512},
                                                {"avx2", has_avx2(), &product_kernels_avx2},
                                                {"portable", true, &product_kernels_portable}};
  return sets;
}

struct Available {
  const InstructionSet* sets[kNumSets + 1] = {};
  const char* names[kNumSets + 1] = {};
  Available() {
    int count = 0;
    for (int i = 0; i < kNumSets; ++i) {
      if (known_sets()[i].available) {
        sets[count] = &known_sets()[i];
        names[count++] = known_sets()[i].name;
      }
    }
  }
};

const Available& available() {
  static const Available result;
  return result;
}

const InstructionSet*& set_in_use() {
  static const InstructionSet* set = available().sets[0];
  return set;
}

const InstructionSet* find(const char* name) {
  for (const InstructionSet* const* set = available().sets; *set != nullptr; ++set) {
    if (std::strcmp((*set)->name, name) == 0) {
      return *set;
    }
  }
  return nullptr;
}

}  // namespace

const char* const* instruction_sets() { return available().names; }

const ProductKernels* product_kernels(const char* instruction_set, ElementType weights) {
  const InstructionSet* set = find(instruction_set);
  return set == nullptr ? nullptr : set->kernels(weights);
}

const ProductKernels& product_kernels(ElementType weights) { return *set_in_use()->kernels(weights); }

bool use_instruction_set(const char* instruction_set) {
  const InstructionSet* set = find(instruction_set);
  if (set != nullptr) {
    set_in_use() = set;
  }
  return set != nullptr;
}

}  // namespace d2moe::kernels

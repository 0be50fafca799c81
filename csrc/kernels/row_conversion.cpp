#include "kernels/row_conversion.h"

#include <cstring>
#include <type_traits>

#include "kernels/round_element.h"
#include "kernels/vector_clones.h"

namespace d2moe::kernels {

namespace {

D2MOE_VECTOR_CLONES void widen(const BFloat16* __restrict__ source, int64_t count, float* __restrict__ out) {
  for (int64_t j = 0; j < count; ++j) {
    out[j] = to_float(source[j]);
  }
}

D2MOE_VECTOR_CLONES void widen(const Float16* __restrict__ source, int64_t count, float* __restrict__ out) {
  for (int64_t j = 0; j < count; ++j) {
    out[j] = to_float(source[j]);
  }
}

D2MOE_VECTOR_CLONES void round_row(const float* __restrict__ sums, int64_t count, BFloat16* __restrict__ out) {
  for (int64_t j = 0; j < count; ++j) {
    out[j] = round_to<BFloat16>(sums[j]);
  }
}

D2MOE_VECTOR_CLONES void round_row(const float* __restrict__ sums, int64_t count, Float16* __restrict__ out) {
  for (int64_t j = 0; j < count; ++j) {
    out[j] = round_to<Float16>(sums[j]);
  }
}

void round_row(const float* sums, int64_t count, float* out) { std::memcpy(out, sums, count * sizeof(float)); }

D2MOE_VECTOR_CLONES void add_scaled(const float* __restrict__ row, float scale, int64_t count,
                                    float* __restrict__ sums) {
  for (int64_t j = 0; j < count; ++j) {
    sums[j] += scale * row[j];
  }
}

D2MOE_VECTOR_CLONES void add_scaled(const BFloat16* __restrict__ row, float scale, int64_t count,
                                    float* __restrict__ sums) {
  for (int64_t j = 0; j < count; ++j) {
    sums[j] += scale * to_float(row[j]);
  }
}

D2MOE_VECTOR_CLONES void add_scaled(const Float16* __restrict__ row, float scale, int64_t count,
                                    float* __restrict__ sums) {
  for (int64_t j = 0; j < count; ++j) {
    sums[j] += scale * to_float(row[j]);
  }
}

D2MOE_VECTOR_CLONES void widen_to(const int8_t* __restrict__ source, int64_t count, float* __restrict__ out) {
  for (int64_t j = 0; j < count; ++j) {
    out[j] = static_cast<float>(source[j]);
  }
}

// The upper half of a float32: nothing is rounded, as eight bits fit.
D2MOE_VECTOR_CLONES void widen_to(const int8_t* __restrict__ source, int64_t count, BFloat16* __restrict__ out) {
  for (int64_t j = 0; j < count; ++j) {
    out[j] = {static_cast<uint16_t>(bit_cast<uint32_t>(static_cast<float>(source[j])) >> 16)};
  }
}

D2MOE_VECTOR_CLONES void widen_to(const int8_t* __restrict__ source, int64_t count, Float16* __restrict__ out) {
  for (int64_t j = 0; j < count; ++j) {
    out[j] = round_to<Float16>(static_cast<float>(source[j]));
  }
}

template <typename From, typename To>
void take(const From* source, const int32_t* columns, int64_t count, To* out) {
  if (columns != nullptr) {
    for (int64_t j = 0; j < count; ++j) {
      if constexpr (std::is_same_v<From, To>) {
        out[j] = source[columns[j]];
      } else {
        out[j] = to_float(source[columns[j]]);
      }
    }
  } else if constexpr (std::is_same_v<From, To>) {
    std::memcpy(out, source, count * sizeof(To));
  } else {
    widen(source, count, out);
  }
}

}  // namespace

void take_row(const void* source, ElementType from, const int32_t* columns, int64_t count, ElementType to, void* out) {
  visit_forward_type(from, [&](auto element) {
    using From = decltype(element);
    if (from == to) {
      take(static_cast<const From*>(source), columns, count, static_cast<From*>(out));
    } else {
      take(static_cast<const From*>(source), columns, count, static_cast<float*>(out));
    }
  });
}

void store_row(const float* sums, int64_t count, ElementType to, void* out) {
  visit_forward_type(to, [&](auto element) { round_row(sums, count, static_cast<decltype(element)*>(out)); });
}

void add_row(const void* row, ElementType type, float scale, const int32_t* columns, int64_t count, float* sums) {
  visit_forward_type(type, [&](auto element) {
    const auto* elements = static_cast<const decltype(element)*>(row);
    if (columns == nullptr) {
      add_scaled(elements, scale, count, sums);
      return;
    }
    for (int64_t j = 0; j < count; ++j) {
      sums[j] += scale * to_float(elements[columns[j]]);
    }
  });
}

void take_row_besides(const void* source, ElementType type, const int32_t* skipped, int64_t num_skipped, int64_t count,
                      void* out) {
  visit_forward_type(type, [&](auto element) {
    using Element = decltype(element);
    constexpr int64_t kVector = 32 / sizeof(Element);
    const auto* from = static_cast<const Element*>(source);
    auto* to = static_cast<Element*>(out);
    int64_t begin = 0, taken = 0;
    for (int64_t i = 0; i <= num_skipped; ++i) {
      const int64_t end = i < num_skipped ? skipped[i] : count;
      // Runs are short: whole vectors, of which the next run overwrites what is too much, save counting.
      int64_t j = begin;
      for (; j < end && j + kVector <= count && taken + (j - begin) + kVector <= count - num_skipped; j += kVector) {
        std::memcpy(to + taken + (j - begin), from + j, 32);
      }
      for (; j < end; ++j) {
        to[taken + (j - begin)] = from[j];
      }
      taken += end - begin;
      begin = end + 1;
    }
  });
}

void clear_row(const uint8_t* keeps, int64_t count, ElementType type, void* row) {
  visit_forward_type(type, [&](auto element) {
    using Element = decltype(element);
    auto* elements = static_cast<Element*>(row);
    for (int64_t j = 0; j < count; ++j) {
      elements[j] = keeps[j] != 0 ? elements[j] : Element();
    }
  });
}

void widen_row(const int8_t* source, int64_t count, ElementType to, void* out) {
  visit_forward_type(to, [&](auto element) { widen_to(source, count, static_cast<decltype(element)*>(out)); });
}

}  // namespace d2moe::kernels

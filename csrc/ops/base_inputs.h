// What the bases multiply.
#pragma once

#include "ops/moe_products.h"

namespace d2moe {

// Rows of a source at each base's columns; with dynamic pruning only those that the rows' scores select (eq. 9). They
// are numbered as the base rows of a routing.
class BaseInputs {
 public:
  // Base row i comes from source row source_row[i] (nullptr: i); the source is source_width wide.
  BaseInputs(const BaseGroup& group, const kernels::MoeRouting& routing, Rows source, int64_t source_width,
             const int64_t* source_row, kernels::ElementType input_type);

  const void* const* from(int64_t row) const { return rows_.from(row); }
  // As much of the base as its rows multiply.
  Matrix matrix(int64_t base) const;

 private:
  void take_rows(int64_t base, int64_t begin, int64_t end, bool selects, const OwnRows& own);

  const BaseGroup& group_;
  int64_t source_width_;
  kernels::ElementType input_type_;
  Rows rows_;
  const int32_t** selected_ = nullptr;  // of each base, where it prunes dynamically by channel
};

}  // namespace d2moe

#include "ops/moe_products.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>

#include "kernels/row_conversion.h"
#include "kernels/tuning_cpu.h"

namespace d2moe {

using kernels::ElementType;
namespace tuning = kernels::tuning;

int64_t size_of(ElementType type) { return type == ElementType::kFloat32 ? 4 : 2; }

OwnRows::OwnRows(int64_t count, int64_t width, ElementType type) : data(workspace().take<void*>(count)) {
  constexpr int64_t kLine = 64;
  const int64_t stride = ((width * size_of(type) + kLine - 1) / kLine | 1) * kLine;
  std::byte* memory = workspace().take<std::byte>(count * stride);
  for (int64_t i = 0; i < count; ++i) {
    data[i] = memory + i * stride;
  }
}

Sums::Sums(int64_t count, int64_t width) : rows(workspace().take<float*>(count)) {
  float* memory = workspace().take<float>(count * width);
  std::fill_n(memory, count * width, 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    rows[i] = memory + i * width;
  }
}

Rows rows_of(const at::Tensor& source, ElementType input_type) {
  const int64_t count = source.size(0), width = source.size(1);
  const ElementType type = element_type(source);
  const auto* elements = static_cast<const std::byte*>(source.const_data_ptr());
  if (type == input_type) {
    const void** data = workspace().take<const void*>(count);
    for (int64_t i = 0; i < count; ++i) {
      data[i] = elements + i * width * size_of(type);
    }
    return {data};
  }
  const OwnRows rows(count, width, input_type);
  parallel_rows(count, width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels::take_row(elements + i * width * size_of(type), type, nullptr, width, input_type, rows[i]);
    }
  });
  return rows;
}

namespace {

// A few rows or channels at a time become the products' type, in memory that stays in the second-level cache.
void multiply_int8(const Matrix& w, const kernels::ProductKernels& kernels, const void* const* x, int64_t num_rows,
                   int64_t begin, int64_t end, float* const* out) {
  const Workspace::Frame frame(workspace());
  const auto* source = static_cast<const int8_t*>(w.data);
  const int64_t width = w.by_channel ? end - begin : w.num_inputs;  // of what is made of one row or channel
  const int64_t step = std::max<int64_t>(kernels::kOutputStep, tuning::kWidenedElements / std::max<int64_t>(1, width) /
                                                                   kernels::kOutputStep * kernels::kOutputStep);
  const int64_t first = w.by_channel ? 0 : begin, last = w.by_channel ? w.num_inputs : end;
  auto* widened = workspace().take<std::byte>(step * width * size_of(w.type));
  const void** x_part = workspace().take<const void*>(num_rows);
  float** out_part = workspace().take<float*>(num_rows);
  for (int64_t i = first; i < last; i += step) {
    const int64_t count = std::min(step, last - i);
    for (int64_t k = 0; k < count; ++k) {
      kernels::widen_row(source + (i + k) * w.stride + (w.by_channel ? begin : 0), width, w.type,
                         widened + k * width * size_of(w.type));
    }
    for (int64_t m = 0; m < num_rows; ++m) {
      x_part[m] = static_cast<const std::byte*>(x[m]) + (w.by_channel ? i * size_of(kernels.input_type) : 0);
      out_part[m] = out[m] + (w.by_channel ? 0 : i - begin);
    }
    if (w.by_channel) {
      kernels.multiply_channels({widened, width, count, nullptr, x_part, num_rows, 0, width, out_part});
    } else {
      kernels.multiply_rows({widened, width, width, x_part, num_rows, 0, count, out_part});
    }
  }
}

}  // namespace

void Matrix::multiply(const void* const* x, int64_t num_rows, int64_t begin, int64_t end, float* const* out) const {
  const kernels::ProductKernels& kernels = kernels::product_kernels(type);
  if (int8) {
    multiply_int8(*this, kernels, x, num_rows, begin, end, out);
  } else if (by_channel) {
    kernels.multiply_channels({data, stride, num_inputs, channels, x, num_rows, begin, end, out});
  } else {
    kernels.multiply_rows({data, stride, num_inputs, x, num_rows, begin, end, out});
  }
}

Matrix base_matrix(const BaseGroup& group, int64_t base) {
  const bool by_channel = group.base.stride(2) != 1 && group.base.stride(1) == 1;
  const ElementType type = element_type(group.base);
  const auto* data = static_cast<const std::byte*>(group.base.const_data_ptr());
  return {data + base * group.base.stride(0) * size_of(type),
          type,
          false,
          by_channel,
          group.base.stride(by_channel ? 2 : 1),
          group.kept()};
}

namespace {

Matrix factor(const at::Tensor& tensor, ElementType type, int64_t element, bool by_channel, int64_t stride,
              int64_t num_inputs) {
  const bool int8 = tensor.scalar_type() == at::kChar;
  const auto* data = static_cast<const std::byte*>(tensor.const_data_ptr());
  return {data + element * tensor.element_size(), type, int8, by_channel, stride, num_inputs};
}

ElementType type_of(const Delta& delta) { return element_type(delta.u_scale.has_value() ? *delta.u_scale : delta.u); }

}  // namespace

Matrix u_matrix(const Delta& delta, int64_t expert) {
  const int64_t start = delta.u_start.const_data_ptr<int32_t>()[expert], width = delta.u.size(1);
  return factor(delta.u, type_of(delta), start * width, true, width, delta.rank_of(expert));
}

Matrix v_matrix(const Delta& delta, int64_t expert) {
  const int64_t start = delta.v_start.const_data_ptr<int32_t>()[expert], width = delta.in_features();
  const bool flat = delta.pivots.has_value();
  const int64_t inputs = flat ? width - delta.rank_of(expert) : width;
  return factor(delta.v, type_of(delta), flat ? start : start * width, false, inputs, inputs);
}

int64_t num_active_experts(const kernels::MoeRouting& routing) {
  int64_t count = 0;
  for (int64_t i = 0; i < routing.num_experts; ++i) {
    count += routing.expert_begin[i + 1] > routing.expert_begin[i];
  }
  return count;
}

void run_blocks(const std::vector<Block>& blocks, const std::function<void(const Block&)>& function) {
  const int64_t count = static_cast<int64_t>(blocks.size());
  const int64_t threads = std::min<int64_t>(count, at::get_num_threads());
  if (threads <= 1) {
    std::for_each(blocks.begin(), blocks.end(), function);
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < count;
         i = next.fetch_add(1, std::memory_order_relaxed)) {
      function(blocks[i]);
    }
  });
}

namespace {

// Kept from call to call; one list is alive at a time.
std::vector<Block>& block_storage() {
  static thread_local std::vector<Block> storage;
  storage.clear();
  return storage;
}

}  // namespace

BlockList::BlockList(int64_t num_jobs)
    : parts_(std::max<int64_t>(
          1, (at::get_num_threads() * tuning::kBlocksPerThread + num_jobs - 1) / std::max<int64_t>(1, num_jobs))),
      blocks_(block_storage()) {}

void BlockList::add(int64_t job, int64_t num_rows, int64_t num_outputs) {
  constexpr int64_t kStep = kernels::kOutputStep;
  const int64_t limit = num_rows <= tuning::kFewRows ? tuning::kOutputsOfFewRows : tuning::kOutputsOfManyRows;
  const int64_t smallest = (num_outputs + 2 * kStep - 1) / (2 * kStep);
  const int64_t parts = std::max((num_outputs + limit - 1) / limit, std::min(parts_, smallest));
  const int64_t width = ((num_outputs + parts - 1) / parts + kStep - 1) / kStep * kStep;
  for (int64_t row = 0; row < num_rows; row += tuning::kRowsPerBlock) {
    for (int64_t begin = 0; begin < num_outputs; begin += width) {
      blocks_.push_back(
          {job, row, std::min(row + tuning::kRowsPerBlock, num_rows), begin, std::min(begin + width, num_outputs)});
    }
  }
}

Projections::Projections(const Delta& delta, const kernels::MoeRouting& routing, Rows x, const int64_t* x_row,
                         const kernels::ProductKernels& kernels)
    : delta_(delta), routing_(routing), x_(x), x_row_(x_row), kernels_(kernels), rows_([&] {
        const int32_t* rank = delta.rank.const_data_ptr<int32_t>();
        const int64_t largest = delta.rank.numel() == 0 ? 0 : *std::max_element(rank, rank + delta.rank.numel());
        return OwnRows(static_cast<int64_t>(routing.sorted_pair.size()), largest, kernels.input_type);
      }()) {}

void Projections::add_blocks(BlockList& blocks, int64_t first_job) const {
  for (int64_t i = 0; i < routing_.num_experts; ++i) {
    const int64_t rank = delta_.rank_of(routing_.expert_order[i]);
    const int64_t num_rows = routing_.expert_begin[i + 1] - routing_.expert_begin[i];
    if (rank > 0 && num_rows > 0) {
      blocks.add(first_job + i, num_rows, rank);
    }
  }
}

namespace {

// scale[j] of some of an int8 factor's rows, in float32.
const float* load_scales(const at::Tensor& scales, int64_t start, int64_t count) {
  float* scale = workspace().take<float>(count);
  const auto* data = static_cast<const std::byte*>(scales.const_data_ptr());
  kernels::take_row(data + start * scales.element_size(), element_type(scales), nullptr, count, ElementType::kFloat32,
                    scale);
  return scale;
}

void multiply_row(float* row, const float* scale, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    row[j] *= scale[j];
  }
}

}  // namespace

// What V, as it is stored, multiplies: rows of x, without the columns at the pivots if there are any.
const void* const* Projections::stored_inputs(int64_t expert, int64_t first_pair, int64_t num_rows) const {
  const void** x = workspace().take<const void*>(num_rows);
  if (!delta_.pivots.has_value()) {
    for (int64_t m = 0; m < num_rows; ++m) {
      x[m] = source_row(first_pair + m);
    }
    return x;
  }
  check_pivots(delta_, expert);
  const int64_t rank = delta_.rank_of(expert);
  const OwnRows taken(num_rows, delta_.in_features() - rank, kernels_.input_type);
  for (int64_t m = 0; m < num_rows; ++m) {
    kernels::take_row_besides(source_row(first_pair + m), kernels_.input_type, delta_.pivots_of(expert), rank,
                              delta_.in_features(), taken[m]);
    x[m] = taken[m];
  }
  return x;
}

// p = scale_u (scale_v (stored V x) + x[pivots]), where there are scales and pivots; rounded once.
void Projections::run(const Block& block, int64_t first_job) const {
  const Workspace::Frame frame(workspace());
  const int64_t place = block.job - first_job, expert = routing_.expert_order[place];
  const int64_t first = routing_.expert_begin[place] + block.row_begin, num_rows = block.row_end - block.row_begin;
  const int64_t width = block.end - block.begin;
  const int64_t u_start = delta_.u_start.const_data_ptr<int32_t>()[expert] + block.begin;
  const int64_t v_start = delta_.v_start.const_data_ptr<int32_t>()[expert] + block.begin;
  const int32_t* pivots = delta_.pivots.has_value() ? delta_.pivots_of(expert) + block.begin : nullptr;
  const Sums own(num_rows, width);
  float* const* sums = own.rows;
  const Matrix v = v_matrix(delta_, expert);
  v.multiply(stored_inputs(expert, first, num_rows), num_rows, block.begin, block.end, sums);
  const float* v_scale =
      delta_.v_scale.has_value() ? load_scales(*delta_.v_scale, pivots == nullptr ? v_start : u_start, width) : nullptr;
  const float* u_scale = delta_.u_scale.has_value() ? load_scales(*delta_.u_scale, u_start, width) : nullptr;
  for (int64_t m = 0; m < num_rows; ++m) {
    if (v_scale != nullptr) {
      multiply_row(sums[m], v_scale, width);
    }
    if (pivots != nullptr) {
      kernels::add_row(source_row(first + m), kernels_.input_type, 1.0f, pivots, width, sums[m]);
    }
    if (u_scale != nullptr) {
      multiply_row(sums[m], u_scale, width);
    }
    kernels::store_row(sums[m], width, kernels_.input_type,
                       static_cast<std::byte*>(rows_[first + m]) + block.begin * size_of(kernels_.input_type));
  }
}

}  // namespace d2moe

// What the halves of moe_forward on the CPU multiply: rows of x, matrices however they are stored, and the blocks of
// work that threads share out.
#pragma once

#include <functional>
#include <vector>

#include "kernels/product_kernels.h"
#include "ops/moe_forward.h"
#include "ops/workspace.h"

namespace d2moe {

// Rows that products take, in the kernels' input type.
struct Rows {
  const void* const* data = nullptr;
  const void* operator[](int64_t i) const { return data[i]; }
  const void* const* from(int64_t i) const { return data + i; }
};

// Rows of a workspace, and pointers to them. Their distance is an odd number of cache lines, as rows that are a
// multiple of a page apart would all want the same few lines of the first-level cache.
struct OwnRows {
  void** data;
  OwnRows(int64_t count, int64_t width, kernels::ElementType type);
  operator Rows() const { return {const_cast<const void* const*>(data)}; }
  void* operator[](int64_t i) const { return data[i]; }
};

// Bytes of an element of a forward type.
int64_t size_of(kernels::ElementType type);

// Rows of float32, zero at first.
struct Sums {
  float** rows;
  Sums(int64_t count, int64_t width);
};

// Rows of a contiguous [., width] tensor of the forward: views, or copies in the kernels' input type.
Rows rows_of(const at::Tensor& source, kernels::ElementType input_type);

// W [out, in] of one base, or of one expert's U or V.
struct Matrix {
  const void* data;
  kernels::ElementType type;  // of the products
  bool int8;                  // stored in eight bits, multiplied without their scale
  bool by_channel;
  int64_t stride;
  int64_t num_inputs;
  const int32_t* channels = nullptr;  // by channel: the num_inputs that are multiplied, nullptr: all

  // out[m][0 .. end - begin) += (W x[m])[begin .. end). `begin` must be a multiple of kernels::kOutputStep.
  void multiply(const void* const* x, int64_t num_rows, int64_t begin, int64_t end, float* const* out) const;
};

Matrix base_matrix(const BaseGroup& group, int64_t base);
Matrix u_matrix(const Delta& delta, int64_t expert);  // [out, rank]
Matrix v_matrix(const Delta& delta, int64_t expert);  // [rank, in], or the rank's others where there are pivots

// A share of a job: some of its rows and outputs.
struct Block {
  int64_t job;
  int64_t row_begin, row_end;
  int64_t begin, end;
};

// How many experts any token goes to.
int64_t num_active_experts(const kernels::MoeRouting& routing);

// Calls function(block) on all threads, each taking the next block when it is done with one. Frames of the threads'
// workspaces are the function's own affair.
void run_blocks(const std::vector<Block>& blocks, const std::function<void(const Block&)>& function);

// Cuts jobs into blocks: outputs at multiples of kernels::kOutputStep, such that all threads have work, and rows at
// multiples of a constant, so that results do not depend on the number of threads.
class BlockList {
 public:
  explicit BlockList(int64_t num_jobs);
  void add(int64_t job, int64_t num_rows, int64_t num_outputs);
  const std::vector<Block>& blocks() const { return blocks_; }

 private:
  int64_t parts_;  // to cut a job's outputs into
  std::vector<Block>& blocks_;
};

// V x of every pair whose expert has a delta, in the order of the sorted pairs: [pairs] rows of up to the largest rank,
// times the scales of U where U is of eight bits.
class Projections {
 public:
  // x_row[i]: the row of x of sorted pair i; nullptr: i.
  Projections(const Delta& delta, const kernels::MoeRouting& routing, Rows x, const int64_t* x_row,
              const kernels::ProductKernels& kernels);
  // Adds a job for each expert with a delta and pairs: first_job and its place in the routing's order.
  void add_blocks(BlockList& blocks, int64_t first_job) const;
  void run(const Block& block, int64_t first_job) const;
  const void* const* from(int64_t position) const { return Rows(rows_).from(position); }

 private:
  const void* source_row(int64_t pair) const { return x_[x_row_ == nullptr ? pair : x_row_[pair]]; }
  const void* const* stored_inputs(int64_t expert, int64_t first_pair, int64_t num_rows) const;

  const Delta& delta_;
  const kernels::MoeRouting& routing_;
  Rows x_;
  const int64_t* x_row_;
  const kernels::ProductKernels& kernels_;
  OwnRows rows_;
};

}  // namespace d2moe

#include "ops/workspace.h"

#include <algorithm>

namespace d2moe {

namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kSmallestChunk = size_t{1} << 20;
// What a thread keeps between calls; a long prompt's memory is given back.
constexpr size_t kLargestKept = size_t{64} << 20;

}  // namespace

Workspace::Frame::Frame(Workspace& workspace)
    : workspace_(workspace), chunk_(workspace.chunk_), used_(workspace.used_) {
  ++workspace_.depth_;
}

Workspace::Frame::~Frame() {
  workspace_.chunk_ = chunk_;
  workspace_.used_ = used_;
  if (--workspace_.depth_ == 0) {
    workspace_.settle();
  }
}

void* Workspace::take_bytes(size_t bytes) {
  // Room for one element more: an empty array, too, has an address of its own.
  const size_t size = (bytes / kAlignment + 1) * kAlignment;
  while (chunk_ < chunks_.size() && used_ + size > chunks_[chunk_].size) {
    ++chunk_;
    used_ = 0;
  }
  if (chunk_ == chunks_.size()) {
    const size_t chunk_size = std::max({size, kSmallestChunk, chunks_.empty() ? 0 : chunks_.back().size});
    chunks_.push_back({std::unique_ptr<std::byte[]>(new std::byte[chunk_size + kAlignment]), chunk_size});
    used_ = 0;
  }
  const auto address = reinterpret_cast<uintptr_t>(chunks_[chunk_].memory.get());
  std::byte* begin = chunks_[chunk_].memory.get() + (kAlignment - address % kAlignment) % kAlignment;
  void* result = begin + used_;
  used_ += size;
  return result;
}

// One chunk that holds what several did, so that the next call takes no more from the system; or none.
void Workspace::settle() {
  size_t total = 0;
  for (const Chunk& chunk : chunks_) {
    total += chunk.size;
  }
  if (total > kLargestKept) {
    chunks_.clear();
  } else if (chunks_.size() > 1) {
    chunks_.clear();
    chunks_.push_back({std::unique_ptr<std::byte[]>(new std::byte[total + kAlignment]), total});
  }
}

Workspace& workspace() {
  static thread_local Workspace own;
  return own;
}

}  // namespace d2moe

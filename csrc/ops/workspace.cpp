#include "ops/workspace.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <new>

namespace d2moe {

namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kSmallestChunk = size_t{1} << 20;
// What a thread keeps between calls; a long prompt's memory is given back.
constexpr size_t kLargestKept = size_t{64} << 20;

// Of large chunks: pages of 2 MiB, where the system has them, are far fewer to be made and looked up.
constexpr size_t kLargePage = size_t{2} << 20;

size_t rounded_up(size_t size, size_t step) { return (size + step - 1) / step * step; }

std::byte* allocate(size_t size) {
  const size_t alignment = size >= kLargePage ? kLargePage : kAlignment;
  void* memory = std::aligned_alloc(alignment, rounded_up(size, alignment));
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
#if defined(MADV_HUGEPAGE)
  if (alignment == kLargePage) {
    madvise(memory, rounded_up(size, alignment), MADV_HUGEPAGE);
  }
#endif
  return static_cast<std::byte*>(memory);
}

}  // namespace

Workspace::Chunk::Chunk(size_t size) : memory(allocate(size)), size(size) {}

void Workspace::Free::operator()(std::byte* memory) const { std::free(memory); }

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
    chunks_.emplace_back(chunk_size);
    used_ = 0;
  }
  void* result = chunks_[chunk_].memory.get() + used_;
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
    chunks_.emplace_back(total);
  }
}

Workspace& workspace() {
  static thread_local Workspace own;
  return own;
}

}  // namespace d2moe

// Memory for the length of a call, kept from one call to the next.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace d2moe {

// A stack of memory. What is taken inside a Frame is given back when the frame ends, and stays there for the next one.
class Workspace {
 public:
  class Frame {
   public:
    explicit Frame(Workspace& workspace);
    ~Frame();
    Frame(const Frame&) = delete;
    Frame& operator=(const Frame&) = delete;

   private:
    Workspace& workspace_;
    size_t chunk_;
    size_t used_;
  };

  // `count` elements, not initialised, at a multiple of 64 bytes.
  template <typename T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(static_cast<size_t>(count) * sizeof(T)));
  }

 private:
  struct Free {
    void operator()(std::byte* memory) const;
  };
  struct Chunk {
    std::unique_ptr<std::byte, Free> memory;
    size_t size;
    explicit Chunk(size_t size);
  };

  void* take_bytes(size_t bytes);
  void settle();

  std::vector<Chunk> chunks_;
  size_t chunk_ = 0;  // the one in use
  size_t used_ = 0;   // of it
  int depth_ = 0;
};

// This thread's own.
Workspace& workspace();

}  // namespace d2moe

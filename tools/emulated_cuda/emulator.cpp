#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda_runtime.h"

// _FORTIFY_SOURCE would take a jump to another stack for an error.
#undef _FORTIFY_SOURCE
#include <csetjmp>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated_cuda {

namespace {

constexpr size_t kStackBytes = 256 * 1024;

struct Copy {
  void* destination;
  const void* source;
  size_t bytes;
};

// A meeting of some threads: a block's or a warp's.
struct Meeting {
  int arrived = 0;
  int64_t round = 0;
};

struct Fiber {
  jmp_buf context;
  std::unique_ptr<unsigned char[]> stack;
  dim3 index;
  int warp, lane;
  bool started = false, finished = false;
  const Meeting* waits_for = nullptr;
  int64_t round = 0;
  std::deque<std::vector<Copy>> copies;  // groups, the last of which is open
};

struct Warp {
  Meeting meeting;
  LaneBytes bytes[2][kWarp];  // rounds take turns: one may still be read while the next begins
  int lanes = 0;
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<unsigned char> shared;
Meeting block_meeting;
jmp_buf scheduler;
Fiber* current = nullptr;
const std::function<void()>* thread_function = nullptr;
int live = 0;
int64_t blocks_run = 0;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulated_cuda: %s in block (%u, %u, %u) of (%u, %u, %u).\n", what, blockIdx.x, blockIdx.y,
               blockIdx.z, gridDim.x, gridDim.y, gridDim.z);
  std::abort();
}

// A fiber's whole life: one thread of a block after another.
void live_on() {
  for (;;) {
    (*thread_function)();
    current->finished = true;
    --live;
    if (live > 0 && block_meeting.arrived == live) {  // a thread that has returned is not waited for
      block_meeting.arrived = 0;
      ++block_meeting.round;
    }
    if (_setjmp(current->context) == 0) {
      _longjmp(scheduler, 1);
    }
  }
}

// The fiber's stack is made by ucontext; every later switch is a jump, which needs no system call.
void start(Fiber& fiber) {
  static ucontext_t origin;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, live_on, 0);
  fiber.started = true;
  swapcontext(&origin, &context);
}

void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.index;
  if (_setjmp(scheduler) == 0) {
    if (fiber.started) {
      _longjmp(fiber.context, 1);
    }
    start(fiber);
  }
}

void meet(Meeting& meeting, int expected) {
  const int64_t round = meeting.round;
  if (++meeting.arrived == expected) {
    meeting.arrived = 0;
    ++meeting.round;
    return;
  }
  current->waits_for = &meeting;
  current->round = round;
  if (_setjmp(current->context) == 0) {
    _longjmp(scheduler, 1);
  }
}

bool can_run(const Fiber& fiber) {
  return !fiber.finished && (fiber.waits_for == nullptr || fiber.waits_for->round > fiber.round);
}

void prepare_block(int threads) {
  while (static_cast<int>(fibers.size()) < threads) {
    fibers.emplace_back();
    fibers.back().stack = std::make_unique<unsigned char[]>(kStackBytes);
  }
  warps.assign((threads + kWarp - 1) / kWarp, Warp());
  block_meeting = Meeting();
  std::fill(shared.begin(), shared.end(), 0xff);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.finished = false;
    fiber.waits_for = nullptr;
    if (fiber.copies.size() != 1 || !fiber.copies.front().empty()) {
      fiber.copies.assign(1, {});
    }
    fiber.warp = i / kWarp;
    fiber.lane = i % kWarp;
    fiber.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
    ++warps[fiber.warp].lanes;
  }
  live = threads;
}

void run_block() {
  const int threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  prepare_block(threads);
  const bool downwards = blocks_run++ % 2 != 0;
  while (live > 0) {
    bool progress = false;
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = fibers[downwards ? threads - 1 - i : i];
      if (can_run(fiber)) {
        fiber.waits_for = nullptr;
        resume(fiber);
        progress = true;
      }
    }
    if (!progress) {
      fail(
          "a barrier must be reached by all threads of a block, and a collective by all lanes of a warp: some never "
          "came");
    }
  }
}

}  // namespace

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> guard(one_at_a_time);
  gridDim = grid;
  blockDim = block;
  shared.resize(shared_bytes + 16);
  thread_function = &thread;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        run_block();
      }
    }
  }
}

unsigned char* dynamic_shared() { return shared.data() + (16 - reinterpret_cast<uintptr_t>(shared.data()) % 16) % 16; }

void block_barrier() { meet(block_meeting, live); }

int lane() { return current->lane; }

const LaneBytes* exchange(const void* bytes, size_t count) {
  Warp& warp = warps[current->warp];
  LaneBytes* lanes = warp.bytes[warp.meeting.round % 2];
  if (count > 0) {
    std::memcpy(lanes[current->lane], bytes, count);
  }
  meet(warp.meeting, warp.lanes);
  return lanes;
}

void check_aligned(const void* address, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    fail(what);
  }
}

void copy_later(void* destination, const void* source, size_t bytes) {
  check_aligned(destination, bytes, "cp.async must have aligned addresses, got one that is not");
  check_aligned(source, bytes, "cp.async must have aligned addresses, got one that is not");
  current->copies.back().push_back({destination, source, bytes});
}

void close_copies() { current->copies.emplace_back(); }

void wait_copies(int open_groups) {
  // The last group is still open and not counted.
  while (static_cast<int>(current->copies.size()) - 1 > open_groups) {
    for (const Copy& copy : current->copies.front()) {
      std::memcpy(copy.destination, copy.source, copy.bytes);
    }
    current->copies.pop_front();
  }
}

}  // namespace emulated_cuda

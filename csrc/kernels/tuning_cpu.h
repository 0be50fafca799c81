// The numbers that were tuned on CPUs, each with what chose it.
#pragma once

#include <cstdint>

namespace d2moe::kernels::tuning {

// Bytes of a row of x that a row product takes at a time: six rows of it stay in a first-level cache of 32 KiB or more.
constexpr int64_t kRowBlockBytes = 4096;
// Weight rows that many rows of x pass by: 128 rows of a block are half of a second-level cache of 1 MiB.
constexpr int64_t kRowPanel = 128;

// By channel: the outputs, in float32, that stay in the first-level cache while channels pass by, over all rows of x.
constexpr int64_t kStripBytes = 16384;
constexpr int64_t kStripMin = 512;
// Where there are many rows of x, weights are packed: blocks of kPackedSteps loads of channels (one channel each, or two of
// bfloat16 where there are instructions for pairs) and kPackedOutputs outputs, 128 KiB of 16-bit weights.
constexpr int64_t kPackedSteps = 128;
constexpr int64_t kPackedOutputs = 256;

// How a product is cut into blocks for the threads: so many for each, of so many outputs at most (for up to kFewRows rows
// of x, and for more), and of so many rows. Results depend on the last one, which must not depend on the threads.
constexpr int64_t kBlocksPerThread = 8;
constexpr int64_t kFewRows = 16;
constexpr int64_t kOutputsOfFewRows = 2048;
constexpr int64_t kOutputsOfManyRows = 512;
constexpr int64_t kRowsPerBlock = 2048;

// Elements of eight-bit factors that are made 16 or 32 bits wide at a time.
constexpr int64_t kWidenedElements = 32768;

}  // namespace d2moe::kernels::tuning

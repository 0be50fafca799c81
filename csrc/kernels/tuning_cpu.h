// The numbers that were tuned on CPUs, each with what chose it. Unless it says otherwise: 2026-11-25, 2 cores of an AMD
// EPYC (family 26) with AVX-512 and bfloat16 instructions, bfloat16, weights from memory, GFLOP/s of products with M
// rows of x, by the loop of benchmarks/bench_kernels.cpp on 2 threads instead of one. The machine's best product had
// 900 to 1000, and 45 to 60 GB/s were read.
#pragma once

#include <cstdint>

namespace d2moe::kernels::tuning {

// Bytes of a row of x that a row product takes at a time: six rows of it stay in a first-level cache of 32 KiB or more.
constexpr int64_t kRowBlockBytes = 4096;
// Weight rows that many rows of x pass by: 128 rows of a block are half of a second-level cache of 1 MiB. With 64, and
// the next 64 called for meanwhile, [M, 2048] x [2048, 1536] had 342, 402, 499 for M = 12, 16, 24 instead of 375, 426,
// 515.
constexpr int64_t kRowPanel = 128;

// By channel: the outputs, in float32, that stay in the first-level cache while channels pass by, over all rows of x.
constexpr int64_t kStripBytes = 16384;
constexpr int64_t kStripMin = 512;
// Where there are many rows of x, weights are packed: blocks of kPackedSteps loads of channels (one channel each, or
// two of bfloat16 where there are instructions for pairs) and kPackedOutputs outputs, 128 KiB of 16-bit weights.
//
// From how many rows on. By channel, M = 16: 297 packed, 172 not; M = 8: 250 not. By row, M = 32: 590 not; M = 64: 715
// packed with the next block called for ahead of time (640 without), M = 128: 820 (762), M = 512: 920.
constexpr int64_t kManyRowsByChannel = 12;
constexpr int64_t kManyRowsByRow = 48;
constexpr int64_t kPackedSteps = 128;
constexpr int64_t kPackedOutputs = 256;

// How a product is cut into blocks for the threads: so many for each, of so many outputs at most (for up to kFewRows
// rows of x, and for more), and of so many rows. Results depend on the last one, which must not depend on the threads.
// With 2048 rows instead of 1024, 2048 tokens of Qwen3-30B-A3B's layer took 221 ms instead of 248; with 512 outputs
// instead of 256, 221 instead of 227.
constexpr int64_t kBlocksPerThread = 8;
constexpr int64_t kFewRows = 16;
constexpr int64_t kOutputsOfFewRows = 2048;
constexpr int64_t kOutputsOfManyRows = 512;
constexpr int64_t kRowsPerBlock = 2048;

// Elements of eight-bit factors that are made 16 or 32 bits wide at a time: 64 or 128 KiB. Not tuned.
constexpr int64_t kWidenedElements = 32768;

}  // namespace d2moe::kernels::tuning

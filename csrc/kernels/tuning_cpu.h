// The numbers that were tuned on CPUs, each with what chose it. Unless it says otherwise: 2026-11-25, 2 cores of an AMD
// EPYC (family 26) with AVX-512 and bfloat16 instructions, bfloat16, weights from memory, GFLOP/s of products with M
// rows of x, by the loop of benchmarks/bench_kernels.cpp on 2 threads instead of one. The machine's best product had
// 900 to 1000, and 45 to 60 GB/s were read.
#pragma once

#include <cstdint>

namespace d2moe::kernels::tuning {

// Bytes of a row of x that a row product takes at a time: eight rows of it stay in a first-level cache of 32 KiB or
// more.
constexpr int64_t kRowBlockBytes = 4096;
// The same of one to four rows, for which W is read line after line, and how far ahead of it memory is called for. One
// row of x, GB/s at the shapes of three models: 60 to 78 so, and 57 to 60 with eight lines side by side, while a plain
// loop that adds numbers up read 67; four rows: 42 to 67 and 41 to 55.
constexpr int64_t kLineBlockBytes = 8192;
constexpr int64_t kAheadBytes = 4096;
// Rows of W of up to so many bytes are also read line after line by up to eight rows of x. [5, 208] x [208, 2816],
// GB/s: 50 and 39; with 8 rows: 36 and 31; [6, 400] x [400, 14336]: 41 and 39.
constexpr int64_t kShortRowBytes = 1024;
// Weight rows that a block of x passes by before the next block does: where all rows of x go at once, and where weights
// wait in the second-level cache (1 MiB) for more of them. Multiples of all tiles' outputs (8, 4, 3).
//
// [M, 14336] x [14336, 4096], GB/s: M = 1, 4, 8: 57, 56, 50 with 48; 57, 56, 46 with 24; 48, 53, 44 with 12. Eight rows
// of x go at once, by 3 outputs each: 46 to 61 GB/s at the shapes of three models, where 6 and 2 with 4 outputs had 39
// to 43. M = 16, by 8, 4 and 4 rows: 32 to 38 GB/s; by 6, 6 and 4: 30 to 33. Calling, during the later rows, for a part
// or all of the next panel gained nothing, with panels of 48, 96 and 192.
constexpr int64_t kFewRowPanel = 48;
constexpr int64_t kRowPanel = 96;

// By channel: the outputs, in float32, that stay in the first-level cache while channels pass by, over all rows of x.
constexpr int64_t kStripBytes = 16384;
constexpr int64_t kStripMin = 512;
// How far ahead memory is called for: in the channels at hand, up to so many rows of x; or else in the ones that
// follow. Half of the channels of Mixtral's and DeepSeek's matrices, GB/s: 1 row of x, 54 to 58 and 48 to 52; 8 rows,
// 24 to 31 and 34 to 38.
constexpr int64_t kChannelAheadRows = 2;
constexpr int64_t kChannelAheadBytes = 2048;
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
// Narrow blocks of weights by channel are short pieces of memory far from one another: with 8 blocks a thread, one
// token of a layer at ratio 0.6 took 1.53 ms (DeepSeek), 1.27 (Qwen3) and 7.9 (Phi-3.5), with 2 blocks 1.43, 0.79
// to 1.15 and 4.8 to 6.7, with 1 block 0.84 to 1.19, 0.66 and 4.5; with 1024 outputs at most instead of 2048, Phi-3.5
// took 5.2 instead of 4.5 and Mixtral 9.5 instead of 7.9, 4096 and 8192 changed nothing. With 2048 rows instead of
// 1024, 2048 tokens of Qwen3-30B-A3B's layer took 221 ms instead of 248; with 512 outputs instead of 256, 221 instead
// of 227.
constexpr int64_t kBlocksPerThread = 1;
constexpr int64_t kFewRows = 16;
constexpr int64_t kOutputsOfFewRows = 2048;
constexpr int64_t kOutputsOfManyRows = 512;
constexpr int64_t kRowsPerBlock = 2048;

// Elements of eight-bit factors that are made 16 or 32 bits wide at a time: 64 or 128 KiB. Not tuned.
constexpr int64_t kWidenedElements = 32768;

}  // namespace d2moe::kernels::tuning

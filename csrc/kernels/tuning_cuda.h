// Numbers that only measurements on a GPU can choose. None of them has been measured yet: each is an estimate, with its
// reason.
#pragma once

#include <cstdint>

namespace d2moe::kernels {

// Rows of x for each group, on average, from which tiles of many rows are used: below it a tile of 128 rows would be
// mostly empty, and up to two tiles of 16 read the same weights from the second-level cache.
constexpr int64_t kManyRowsEach = 33;

// Blocks for each multiprocessor, up to which the channels of a product of few rows are split.
constexpr int64_t kBlocksPerProcessor = 2;

// Steps over kDepth channels that a part of a split product takes at least: filling its pipeline takes three.
constexpr int64_t kStepsEach = 6;
constexpr int64_t kMostSplits = 32;

// Tokens up to which rows are not sorted: each pair is then a tile by itself, and the sort's launch is saved.
constexpr int64_t kUnsortedTokens = 4;

// Tokens from which a single base is multiplied by cuBLAS: up to here one tile of rows reads every weight once.
constexpr int64_t kLibraryTokens = 17;

// Tokens from which cuBLAS multiplies a gathered copy of the channels that dynamic pruning keeps: below it reading and
// writing the copy costs more than multiplying zeros.
constexpr int64_t kGatherTokens = 1024;
constexpr int64_t kMostGatheredBytes = 64 << 20;

}  // namespace d2moe::kernels

// <immintrin.h>, to be included above a file's switch of instruction sets.
#pragma once

#if !defined(__clang__)
// GCC 12 takes the undefined vectors of its own intrinsics for a mistake of ours, wherever they are used.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

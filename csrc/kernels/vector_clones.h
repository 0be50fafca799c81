// D2MOE_VECTOR_CLONES before a function: it is compiled for several instruction sets, and the loader picks one. For
// plain loops that a compiler turns into vectors; what they call must be inlined.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define D2MOE_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define D2MOE_VECTOR_CLONES
#endif

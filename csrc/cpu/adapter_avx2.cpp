// The adapter's kernels for AVX2 with FMA and F16C.
#if defined(__x86_64__)
#include "kernels_prelude.h"
#define HF_NAMESPACE avx2
#define HF_WIDTH 8
#define HF_HAS_DPBF16 0
#define HF_HAS_F16C 1
// A region, not a compiler flag: inline functions of the standard headers stay fit for every CPU, whichever copy the
// linker keeps.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "instruction_set.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

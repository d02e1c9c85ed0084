// The adapter's kernels for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#include "kernels_prelude.h"
// GCC 12's own AVX-512 header trips it: its intrinsics start from a register that is meant to hold anything.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#define HF_NAMESPACE avx512
#define HF_WIDTH 16
#define HF_HAS_DPBF16 0
#define HF_HAS_F16C 1
// A region, not a compiler flag: inline functions of the standard headers stay fit for every CPU, whichever copy the
// linker keeps.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#endif
#include "instruction_set.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

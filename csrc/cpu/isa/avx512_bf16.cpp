// The kernels for AVX-512 (F, BW, DQ, VL) with products of bfloat16 pairs (BF16).
#if defined(__x86_64__)
#include "prelude.h"

#define HF_NAMESPACE avx512_bf16
#define HF_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c"
#define HF_LANES 16
#define HF_HAS_F16C 1
#define HF_HAS_DPBF16 1

#include "kernels-inl.h"
#endif

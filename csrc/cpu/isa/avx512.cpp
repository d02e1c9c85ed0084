// The kernels for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#include "prelude.h"

#define HF_NAMESPACE avx512
#define HF_TARGET "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"
#define HF_LANES 16
#define HF_HAS_F16C 1
#define HF_HAS_DPBF16 0

#include "kernels-inl.h"
#endif

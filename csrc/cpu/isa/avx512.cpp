// The kernels for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#include "prelude.h"

#define HFF_NAMESPACE avx512
#define HFF_TARGET "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"
#define HFF_LANES 16
#define HFF_HAS_F16C 1
#define HFF_HAS_DPBF16 0

#include "kernels-inl.h"
#endif

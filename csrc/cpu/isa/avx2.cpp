// The kernels for AVX2 with FMA and F16C.
#if defined(__x86_64__)
#include "prelude.h"

#define HFF_NAMESPACE avx2
#define HFF_TARGET "avx2,fma,f16c"
#define HFF_LANES 8
#define HFF_HAS_F16C 1
#define HFF_HAS_DPBF16 0

#include "kernels-inl.h"
#endif

// The kernels for AVX2 with FMA and F16C.
#if defined(__x86_64__)
#include "prelude.h"

#define HF_NAMESPACE avx2
#define HF_TARGET "avx2,fma,f16c"
#define HF_LANES 8
#define HF_HAS_F16C 1
#define HF_HAS_DPBF16 0

#include "kernels-inl.h"
#endif

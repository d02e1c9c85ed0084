// The target of kernels for AVX2 with FMA and F16C.
#define HFF_NAMESPACE avx2
#define HFF_TARGET "avx2,fma,f16c"
#define HFF_LANES 8
#define HFF_HAS_F16C 1
#define HFF_HAS_DPBF16 0

// The target of kernels for AVX-512 (F, BW, DQ, VL) with products of bfloat16 pairs (BF16).
#define HFF_NAMESPACE avx512_bf16
#define HFF_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c"
#define HFF_LANES 16
#define HFF_HAS_F16C 1
#define HFF_HAS_DPBF16 1

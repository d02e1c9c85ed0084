// The target of kernels for any CPU: vectors of four, which SSE2 and NEON have. No target region is needed.
#define HFF_NAMESPACE portable
#define HFF_LANES 4
#define HFF_HAS_F16C 0
#define HFF_HAS_DPBF16 0

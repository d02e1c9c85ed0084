// The kernels for any CPU: vectors of four, which SSE2 and NEON have. No target region is needed.
#include "prelude.h"

#define HF_NAMESPACE portable
#define HF_LANES 4
#define HF_HAS_F16C 0
#define HF_HAS_DPBF16 0

#include "kernels-inl.h"

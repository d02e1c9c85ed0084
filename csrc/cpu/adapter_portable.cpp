// The adapter's kernels for any CPU: vectors of four, which SSE2 and NEON have.
#include "kernels_prelude.h"
#define HF_NAMESPACE portable
#define HF_WIDTH 4
#define HF_HAS_DPBF16 0
#define HF_HAS_F16C 0
#include "instruction_set.h"

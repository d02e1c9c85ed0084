#if defined(__x86_64__)
#include "prelude.h"
#include "target_avx512_bf16.h"
// After the target that they are compiled for.
#include "kernels-inl.h"
#endif

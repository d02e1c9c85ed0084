#if defined(__x86_64__)
#include "prelude.h"
#include "target_avx2.h"
// After the target that they are compiled for.
#include "attention_kernels-inl.h"
#endif

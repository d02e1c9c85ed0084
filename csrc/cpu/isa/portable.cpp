#include "prelude.h"
#include "target_portable.h"
// After the target that they are compiled for.
#include "kernels-inl.h"

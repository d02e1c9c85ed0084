// The kernels of attention and of the loss (../attention.h) for one instruction set, in the way of kernels-inl.h.

#ifdef HFF_TARGET
HFF_OPEN_TARGET(HFF_TARGET)
#endif

namespace hyperformer_fast {
namespace HFF_NAMESPACE {

// clang-format off: each needs those before it
#include "../../bf16-inl.h"
#include "simd-inl.h"
#include "storage-inl.h"
#include "paired-inl.h"
#include "products-inl.h"
#include "results-inl.h"
#include "weights-inl.h"
#include "activate-inl.h"
#include "row_loops-inl.h"
#include "philox-inl.h"
#include "transpose-inl.h"
#include "softmax-inl.h"
#include "operands-inl.h"
#include "attention-inl.h"
#include "cross_entropy-inl.h"
// clang-format on

extern const AttentionKernels kAttention;
const AttentionKernels kAttention = {softmax_forward_any, softmax_backward_any, attention_forward_any,
                                     attention_backward_any, cross_entropy_any};

}  // namespace HFF_NAMESPACE
}  // namespace hyperformer_fast

#ifdef HFF_TARGET
HFF_CLOSE_TARGET
#endif

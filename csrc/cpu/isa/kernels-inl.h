// The adapter kernels of one instruction set. Its translation unit includes prelude.h, the header target_*.h with the
// macros below, and this file once; pieces-inl.h is the same for the pieces.
//   HFF_NAMESPACE   the name of the instruction set, and of its namespace
//   HFF_TARGET      what the compiler calls it; undefined where every CPU has it
//   HFF_LANES       floats in a vector: 4, 8 or 16
//   HFF_HAS_F16C    whether there are instructions that convert float16
//   HFF_HAS_DPBF16  whether there is vdpbf16ps, which multiplies pairs of bfloat16
// Files called *-inl.h have no include guard and belong to this one alone: what they define is compiled once per
// instruction set, inside its target region and namespace.

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
#include "rows-inl.h"
#include "pre_norm-inl.h"
#include "tasks-inl.h"
#include "forward-inl.h"
#include "few_rows-inl.h"
#include "finish-inl.h"
#include "backward-inl.h"
#include "transpose-inl.h"
#include "generate-inl.h"
#include "fold-inl.h"
#include "row_loops-inl.h"
#include "philox-inl.h"
#include "residual_rows-inl.h"
#include "adapter_residual-inl.h"
// clang-format on

void fold_any(const float* packed, int64_t T, const AdapterLayout& layout, Dtype dtype, const FoldedResults& folded,
              const Parallel& parallel) {
  with_storage(dtype, [&]<class S>(S) { fold<S>(packed, T, layout, folded, parallel); });
}

void forward_any(const Problem& p, const Rows& x, const FoldedWeights& folded, void* out, const SavedRows& saved,
                 const Parallel& parallel) {
  with_storage(p.dtype, [&]<class S>(S) { forward<S>(p, x, folded, out, saved, parallel); });
}

void backward_any(const Problem& p, const Rows& g, const Rows& x, const SavedRows& saved, const float* packed,
                  const FoldedWeights& folded, void* dx, float* dpacked, const Parallel& parallel) {
  with_storage(p.dtype, [&]<class S>(S) { backward<S>(p, g, x, saved, packed, folded, dx, dpacked, parallel); });
}

#define HFF_STRING_OF(token) #token
#define HFF_STRING(macro) HFF_STRING_OF(macro)
extern const PieceKernels kPieces;         // pieces-inl.h
extern const AttentionKernels kAttention;  // attention_kernels-inl.h
extern const Kernels kKernels;
const Kernels kKernels = {HFF_STRING(HFF_NAMESPACE), fold_any, forward_any, few_rows, backward_any, generate,
                          forward_residual_any,      &kPieces, &kAttention};

}  // namespace HFF_NAMESPACE
}  // namespace hyperformer_fast

#ifdef HFF_TARGET
HFF_CLOSE_TARGET
#endif

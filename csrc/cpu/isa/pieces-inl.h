// The kernels of the pieces (../pieces.h) for one instruction set, in the way of kernels-inl.h. They are a unit of
// their own, so that neither is compiled where the other changes.

#ifdef HFF_TARGET
HFF_OPEN_TARGET(HFF_TARGET)
#endif

namespace hyperformer_fast {
namespace HFF_NAMESPACE {

// clang-format off: each needs those before it
#include "../../bf16-inl.h"
#include "simd-inl.h"
#include "storage-inl.h"
#include "activate-inl.h"
#include "row_loops-inl.h"
#include "philox-inl.h"
#include "residual_rows-inl.h"
#include "residual-inl.h"
#include "act_dropout-inl.h"
// clang-format on

extern const PieceKernels kPieces;
const PieceKernels kPieces = {residual_forward_any, residual_backward_any, act_dropout_forward_any,
                              act_dropout_backward_any};

}  // namespace HFF_NAMESPACE
}  // namespace hyperformer_fast

#ifdef HFF_TARGET
HFF_CLOSE_TARGET
#endif

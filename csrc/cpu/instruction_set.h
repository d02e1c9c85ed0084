// The body of one instruction set's translation unit. The includer defines HF_NAMESPACE, HF_WIDTH, HF_HAS_F16C,
// HF_HAS_DPBF16, has included kernels_prelude.h, and has opened the target region: only what is below is compiled for
// it, never a standard header's code.

namespace hyperformer_fast {
namespace HF_NAMESPACE {

// clang-format off: each needs those before it
#include "simd.h"
#include "paired.h"
#include "micro.h"
#include "results.h"
#include "weights.h"
#include "activate.h"
#include "rows.h"
#include "pre_norm.h"
#include "drive.h"
#include "forward.h"
#include "finish.h"
#include "backward.h"
#include "generate.h"
// clang-format on

void adapter_forward(const Problem& p, const Rows& x, const FoldedWeights& folded, void* out, const SavedRows& saved,
                     const Parallel& parallel) {
  switch (p.dtype) {
    case Dtype::f32:
      return forward<F32>(p, x, folded, out, saved, parallel);
    case Dtype::bf16:
      return forward<BF16>(p, x, folded, out, saved, parallel);
    case Dtype::f16:
      return forward<F16>(p, x, folded, out, saved, parallel);
  }
}

void adapter_backward(const Problem& p, const Rows& g, const Rows& x, const SavedRows& saved, const float* packed,
                      const FoldedWeights& folded, void* dx, float* dpacked, const Parallel& parallel) {
  switch (p.dtype) {
    case Dtype::f32:
      return backward<F32>(p, g, x, saved, packed, folded, dx, dpacked, parallel);
    case Dtype::bf16:
      return backward<BF16>(p, g, x, saved, packed, folded, dx, dpacked, parallel);
    case Dtype::f16:
      return backward<F16>(p, g, x, saved, packed, folded, dx, dpacked, parallel);
  }
}

void generate_weights(const float* E, const float* G, const float* g0, int64_t n, int64_t P, int64_t k, float* packed,
                      const Parallel& parallel) {
  generate(E, G, g0, n, P, k, packed, parallel);
}

}  // namespace HF_NAMESPACE
}  // namespace hyperformer_fast

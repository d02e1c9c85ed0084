// Folding of many adapters in one launch, one block per adapter.
#include "fold.cuh"
#include "launch.cuh"

namespace hyperformer_fast {
namespace {

template <class S>
__global__ void __launch_bounds__(FoldTraits::kThreads, 1) fold_kernel(const FoldParams p) {
  HFF_SHARED(shared);
  fold_adapter<S>(p, blockIdx.x, shared);
}

}  // namespace

void fold(const FoldParams& p, Dtype dtype, const Stream& stream) {
  if (p.M > INT32_MAX) throw std::runtime_error("fold: too many adapters for one launch");
  by_dtype(dtype, [&]<class S>(S) {
    launch<fold_kernel<S>>("fold", dim3{unsigned(p.M), 1, 1}, FoldTraits::kThreads, FoldTraits::bytes(p.d, p.b), stream,
                           p);
  });
}

int fold_shared_bytes(int d, int b) { return FoldTraits::bytes(d, b); }

}  // namespace hyperformer_fast

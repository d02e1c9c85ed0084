// Folding of many adapters: one block each.
#include "fold.cuh"

namespace hyperformer_fast {
namespace {

template <class S>
__global__ void __launch_bounds__(FoldTraits::THREADS, 1) fold_kernel(const FoldParams p) {
  HF_SHARED(shared);
  fold_adapter<S>(p, blockIdx.x, shared);
}

template <class S>
void run(const FoldParams& p, void* stream) {
  launch(fold_kernel<S>, "fold", dim3{unsigned(p.M), 1, 1}, FoldTraits::THREADS, FoldTraits::bytes(p.b), stream, p);
}

}  // namespace

void fold(const FoldParams& p, Kind kind, void* stream) {
  if (p.M > INT32_MAX) throw std::runtime_error("fold: too many adapters for one launch");
  if (kind == Kind::f32) return run<F32>(p, stream);
  if (kind == Kind::bf16) return run<BF16>(p, stream);
  run<F16>(p, stream);
}

int fold_shared_bytes(int b) { return FoldTraits::bytes(b); }

}  // namespace hyperformer_fast

#include "adapter_forward.cuh"

namespace hyperformer_fast {

void forward(const ForwardParams& p, Kind kind, void* stream) {
  if (kind == Kind::f32) return forward_of<F32>(p, stream);
  if (kind == Kind::bf16) return forward_of<BF16>(p, stream);
  forward_of<F16>(p, stream);
}

int forward_shared_bytes(int b, Kind kind) { return kind == Kind::f32 ? shared_bytes<F32>(b) : shared_bytes<BF16>(b); }

}  // namespace hyperformer_fast

// Generation for a whole stack in one launch.
#include "generate.cuh"
#include "launch.cuh"

namespace hyperformer_fast {
namespace {

// Two blocks a multiprocessor: for the three that shared memory allows on sm_80, ptxas would spill.
__global__ void __launch_bounds__(GenerateTraits::kThreads, 2) generate_kernel(const GenerateParams p) {
  HFF_SHARED(shared);
  generate_tile(p, blockIdx.x, blockIdx.y, shared);
}

}  // namespace

void generate(const GenerateParams& p, const Stream& stream) {
  const int64_t stripes = stripes_of(p), groups = p.Q * groups_of(p);
  if (stripes > INT32_MAX || groups > 65535)
    throw std::runtime_error("generate_weights: too many embeddings for one launch");
  launch<generate_kernel>("generate_weights", dim3{unsigned(stripes), unsigned(groups), 1}, GenerateTraits::kThreads,
                          GenerateTraits::kBytes, stream, p);
}

int generate_shared_bytes() { return GenerateTraits::kBytes; }

}  // namespace hyperformer_fast

// One site in one launch: generation, then folding, then application. Each part needs everything that the part before
// it made, whichever block made it. So the grid is cooperative: all blocks are on the device at once, take their share
// of each part in strides of the grid, and wait for one another between parts.
#pragma once

#include "few_rows.cuh"
#include "fold.cuh"
#include "generate.cuh"

namespace hyperformer_fast {

template <class S, int BB, bool ALIGNED>
__global__ void __launch_bounds__(256, 1) site_kernel(const SiteParams p) {
  static_assert(GenerateTraits::kThreads == 256 && FoldTraits::kThreads == 256 && kFewThreads == 256);
  HFF_SHARED(shared);
  const int64_t block = blockIdx.x, blocks = gridDim.x, stripes = stripes_of(p.generate);
  for (int64_t i = block; i < stripes * groups_of(p.generate); i += blocks)
    generate_tile(p.generate, i % stripes, i / stripes, shared);
  wait_for_grid();
  for (int64_t m = block; m < p.fold.M; m += blocks) {
    fold_adapter<S>(p.fold, m, shared);
    __syncthreads();
  }
  wait_for_grid();
  if (p.use_few_rows_kernel) {
    for (int64_t row = block; row < p.forward.tasks.B * p.forward.tasks.M; row += blocks) {
      forward_row<S, BB, ALIGNED>(p.forward, row, shared);
      __syncthreads();
    }
  } else {
    for (int64_t unit = block; unit < units_of(p.forward.tasks); unit += blocks) {
      forward_rows<S, BB, 0, ALIGNED>(p.forward, place_of(p.forward.tasks, unit), shared);
      __syncthreads();
    }
  }
}

template <class S, int BB, bool ALIGNED>
int site_bytes(int d, int b) {
  return std::max({GenerateTraits::kBytes, FoldTraits::bytes(d, b), TileTraits<S, BB>::kBytes,
                   FewRowsTraits<S, BB, ALIGNED>::bytes(d, b)});
}

template <class S>
struct LaunchSite {
  const SiteParams& p;
  const Stream& stream;

  template <int BB, bool ALIGNED>
  void at() const {
    const Tasks& tasks = p.forward.tasks;
    const int64_t useful = std::max({stripes_of(p.generate) * groups_of(p.generate), p.fold.M,
                                     p.use_few_rows_kernel ? tasks.B * tasks.M : units_of(tasks), int64_t(1)});
    launch_together<site_kernel<S, BB, ALIGNED>>("hyper_adapter", useful, 256,
                                                 site_bytes<S, BB, ALIGNED>(p.forward.d, p.forward.b), stream, p);
  }
};

template <class S>
void site_of(const SiteParams& p, const Stream& stream) {
  // Only three forms, to keep the build short: the projections of so few rows take a small part of the time.
  const LaunchSite<S> run{p, stream};
  if (!p.forward.aligned) return run.template at<kLargestBottleneck, false>();
  if (p.forward.b <= 32) return run.template at<32, true>();
  run.template at<kLargestBottleneck, true>();
}

// Each number type has a translation unit of its own, which also instantiates the forward for few rows.
extern template void few_rows_of<F32>(const ForwardParams&, const Stream&);
extern template void few_rows_of<BF16>(const ForwardParams&, const Stream&);
extern template void few_rows_of<F16>(const ForwardParams&, const Stream&);
extern template void site_of<F32>(const SiteParams&, const Stream&);
extern template void site_of<BF16>(const SiteParams&, const Stream&);
extern template void site_of<F16>(const SiteParams&, const Stream&);

}  // namespace hyperformer_fast

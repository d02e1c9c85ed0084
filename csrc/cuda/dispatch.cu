// Host-side choices: the number type of a call, the kernel for few rows, the size of segments, shared memory.
#include <algorithm>

#include "adapter_backward.cuh"
#include "adapter_forward.cuh"
#include "site.cuh"
#include "weight_gradients.cuh"

namespace hyperformer_fast {

// A decoding step has about so many rows, and a GPU with as many multiprocessors gives each row one.
std::atomic<int64_t> few_rows{64};

// Samples of one row each count as few however many there are: in either kernel, a block would have only one row.
static bool are_few(const Tasks& tasks) {
  return tasks.B * tasks.M <= few_rows || (tasks.index != nullptr && tasks.M == 1 && few_rows > 0);
}

void forward(const ForwardParams& p, Dtype dtype, const Stream& stream) {
  by_dtype(dtype, [&]<class S>(S) { are_few(p.tasks) ? few_rows_of<S>(p, stream) : forward_of<S>(p, stream); });
}

void site(SiteParams p, Dtype dtype, const Stream& stream) {
  p.use_few_rows_kernel = are_few(p.forward.tasks);
  by_dtype(dtype, [&]<class S>(S) { site_of<S>(p, stream); });
}

void backward(const BackwardParams& p, Dtype dtype, const Stream& stream) {
  by_dtype(dtype, [&]<class S>(S) { backward_of<S>(p, stream); });
}

void weight_gradients(const WeightGradientParams& p, Dtype dtype, const Stream& stream) {
  by_dtype(dtype, [&]<class S>(S) { weight_gradients_of<S>(p, stream); });
}

int64_t segment_share(const Adapter& adapter, int64_t units, Dtype dtype) {
  // One block for each multiprocessor of an H100: its copies are far enough ahead to keep the memory busy, and more
  // segments would only make more partial sums.
  constexpr int64_t kBlocks = 132;
  const int64_t columns = dtype == Dtype::kFloat32 ? 64 : 128, chunks = (adapter.d + columns - 1) / columns;
  const int64_t of_a_segment = chunks + (adapter.post_norm && adapter.b > 32 ? adapter.b > 64 ? 4 : 2 : 1);
  const int64_t wanted = std::max<int64_t>(1, std::min((units + 3) / 4, kBlocks / of_a_segment));
  return std::max<int64_t>(1, (units + wanted - 1) / wanted);
}

template <class S>
static int record_bytes_of(int b, bool aligned) {
  return b <= 16 && aligned   ? RowRecord<S, 16>::kBytes
         : b <= 32            ? RowRecord<S, 32>::kBytes
         : b <= 64 && aligned ? RowRecord<S, 64>::kBytes
                              : RowRecord<S, kLargestBottleneck>::kBytes;
}

int record_bytes(int b, Dtype dtype, bool aligned) {
  return dtype == Dtype::kFloat32    ? record_bytes_of<F32>(b, aligned)
         : dtype == Dtype::kBFloat16 ? record_bytes_of<BF16>(b, aligned)
                                     : record_bytes_of<F16>(b, aligned);
}

int forward_shared_bytes(int b, Dtype dtype) {
  return dtype == Dtype::kFloat32 ? tile_shared_bytes<F32>(b) : tile_shared_bytes<BF16>(b);
}

// The shared memory of the aligned kernel with the widest bottleneck tile.
int few_rows_shared_bytes(int d, int b, Dtype dtype) {
  return dtype == Dtype::kFloat32 ? FewRowsTraits<F32, kLargestBottleneck, true>::bytes(d, b)
                                  : FewRowsTraits<BF16, kLargestBottleneck, true>::bytes(d, b);
}

int site_shared_bytes(int d, int b, Dtype dtype) {
  return std::max({generate_shared_bytes(), fold_shared_bytes(d, b), forward_shared_bytes(b, dtype),
                   few_rows_shared_bytes(d, b, dtype)});
}

int backward_shared_bytes(int b, Dtype dtype) { return forward_shared_bytes(b, dtype); }

int weight_gradients_shared_bytes(int b, Dtype dtype) {
  return dtype == Dtype::kFloat32    ? weight_gradients_bytes<F32>(b)
         : dtype == Dtype::kBFloat16 ? weight_gradients_bytes<BF16>(b)
                                     : weight_gradients_bytes<F16>(b);
}

}  // namespace hyperformer_fast

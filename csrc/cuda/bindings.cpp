// The raw ops of the CUDA library, through LibTorch's stable ABI. The library links to no CUDA library of torch, so
// that it also loads beside a CPU-only torch. There is no autograd here and there are no fakes: hyperformer_fast/ops/
// has those.
//
// Compiled with HFF_EMULATED, the same ops run the same kernels on CPU tensors, for tests.
#include "../tensors.h"
#include "params.h"

#ifdef HFF_EMULATED
#define HFF_LIBRARY hyperformer_fast_cuda_emulated
#define HFF_DEVICE CPU
#else
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#define HFF_LIBRARY hyperformer_fast_cuda
#define HFF_DEVICE CUDA
#endif

namespace hyperformer_fast {
namespace {

#ifdef HFF_EMULATED
struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor&) {}
  Stream stream;
};
#else
// Makes t's device the current one and finds torch's current stream there; never falls back to the default stream.
struct OnDeviceOf {
  torch::stable::accelerator::DeviceGuard guard;
  Stream stream;

  explicit OnDeviceOf(const Tensor& t) : guard(t.get_device_index()) {
    using CurrentStream = int32_t (*)(int32_t, void**);
    static const auto current = [] {
      void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return torch_cuda == nullptr
                 ? nullptr
                 : reinterpret_cast<CurrentStream>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"));
    }();
    STD_TORCH_CHECK(current != nullptr,
                    "torch's current CUDA stream cannot be found: this torch has no libtorch_cuda.so");
    STABLE_TORCH_ERROR_CODE_CHECK(current(t.get_device_index(), &stream.handle));
    stream.device = t.get_device_index();
  }
};
#endif

void expect_adapter(int64_t d, int64_t b) {
  expect_sizes(d, b);
  STD_TORCH_CHECK(b <= kLargestBottleneck, "b must be at most ", kLargestBottleneck, ", got ", b);
}

void expect_device(const Tensor& x, std::initializer_list<const Tensor*> others) {
  for (const Tensor* t : others)
    STD_TORCH_CHECK(t->get_device_index() == x.get_device_index(), "all tensors must be on one device, ",
                    x.get_device_index(), ", got one on ", t->get_device_index());
}

bool starts_aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

// The arguments of generation: packed [Q, n, P] from E [Q, n, k], G [Q, P, k] and g0 [Q, P].
GenerateParams generate_params(const Tensor& E, const Tensor& G, const Tensor& g0, Tensor& packed, int64_t Q, int64_t n,
                               int64_t P, int64_t k) {
  return {floats(E),
          floats(G),
          floats(g0),
          floats(packed),
          Q,
          n,
          P,
          k,
          k % 4 == 0 && starts_aligned(E) && starts_aligned(G)};
}

Tensor generate_weights_op(const Tensor& E, const Tensor& G, const Tensor& g0) {
  expect_generator(E, G, g0);
  expect_device(E, {&G, &g0});
  const int64_t Q = E.size(0), n = E.size(1), k = E.size(2), P = G.size(1);
  Tensor packed = empty({Q}, {n, P}, ScalarType::Float, &E);
  if (Q * n * P == 0) return packed;
  const OnDeviceOf device(E);
  generate(generate_params(E, G, g0, packed, Q, n, P, k), device.stream);
  return packed;
}

PackedParts parts_of(const AdapterLayout& layout) {
  return {layout.numel(),   layout.down_bias(),  layout.up_weight(),
          layout.up_bias(), layout.post_gamma(), layout.pre_gamma()};
}

FoldParams fold_params(const Tensor& packed, const AdapterLayout& layout, FoldedTensors& made) {
  return {floats(packed),
          made.wd.mutable_data_ptr(),
          made.wg.mutable_data_ptr(),
          floats(made.vectors),
          floats(made.scale),
          floats(made.root),
          floats(made.mean),
          packed.numel() / layout.numel(),
          layout.vectors(),
          parts_of(layout),
          int(layout.d),
          int(layout.b),
          layout.pre_norm,
          layout.post_norm};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fold_op(const Tensor& packed, int64_t d, int64_t b,
                                                                   bool pre_norm, bool post_norm, ScalarType dtype) {
  expect_adapter(d, b);
  const AdapterLayout layout{d, b, pre_norm, post_norm};
  const Dtype compute = compute_dtype("dtype", dtype);
  Sizes whole = lead_of(packed);
  whole.push_back(layout.numel());
  expect("packed", packed, ScalarType::Float, whole);
  FoldedTensors made(lead_of(packed), layout, dtype, &packed);
  if (packed.numel() > 0) {
    const OnDeviceOf device(packed);
    fold(fold_params(packed, layout, made), compute, device.stream);
  }
  return made.tuple();
}

// The rows of x [..., d] as B samples of M rows with a common stride; a tensor that has none is copied once.
struct RowView {
  Tensor keep;
  int64_t B = 1, M = 1, stride_sample = 0, stride_row = 0;

  RowView(const Tensor& t, bool by_sample) : keep(dense_rows(t)) {
    if (!find(by_sample)) {
      keep = torch::stable::contiguous(t);
      find(by_sample);
    }
  }

  bool find(bool by_sample) {
    const int64_t dims = keep.dim() - 1;
    B = by_sample ? keep.size(0) : 1;
    stride_sample = by_sample && B > 1 ? keep.stride(0) : 0;
    M = 1;
    stride_row = 0;
    for (int64_t i = dims - 1; i >= (by_sample ? 1 : 0); --i) {
      if (keep.size(i) == 1) continue;
      if (M == 1)
        stride_row = keep.stride(i);
      else if (keep.stride(i) != M * stride_row)
        return false;
      M *= keep.size(i);
    }
    return true;
  }

  Rows rows() const { return {keep.const_data_ptr(), stride_sample, stride_row}; }

  bool aligned(int64_t d) const {
    const int64_t bytes = keep.scalar_type() == ScalarType::Float ? 4 : 2;
    return reinterpret_cast<uintptr_t>(keep.const_data_ptr()) % 16 == 0 && d * bytes % 16 == 0 &&
           stride_sample * bytes % 16 == 0 && stride_row * bytes % 16 == 0;
  }
};

ForwardTensors make_results(const Tensor& x, const AdapterLayout& layout, bool save) {
  return {empty(lead_of(x), {layout.d}, x.scalar_type(), &x), x, layout, save, &x};
}

// A call as the kernels take it.
struct CudaCall : Call {
  Adapter adapter;
  Tasks tasks{};
  Folded folded{};
  bool weights_aligned = false;

  template <class... Arguments>
  CudaCall(const Tensor& x, Arguments&&... arguments) : Call(x, std::forward<Arguments>(arguments)...) {
    expect_adapter(layout.d, layout.b);
    adapter = {int(layout.d), int(layout.b), activation, layout.pre_norm, layout.post_norm};
    tasks.T = T;
    if (!by_sample()) return;
    expect_device(x, {&*index});
    tasks.index = index->const_data_ptr();
    tasks.wide = index_is_wide();
  }

  void use(const Tensor& x, const FoldedArguments& f) {
    check(f);
    expect_device(x, {&f.wd, &f.wg, &f.vectors, &f.scale, &f.root, &f.mean});
    folded = {f.wd.const_data_ptr(), f.wg.const_data_ptr(), floats(f.vectors), floats(f.scale), floats(f.root)};
    weights_aligned = starts_aligned(f.wd) && starts_aligned(f.wg);
  }

  ForwardParams forward_params(const RowView& rows, ForwardTensors& made, bool save) {
    tasks.B = rows.B, tasks.M = rows.M;
    return {adapter,
            rows.rows(),
            tasks,
            folded,
            made.out.mutable_data_ptr(),
            save ? made.z.mutable_data_ptr() : nullptr,
            floats(made.r),
            floats(made.pre_mean),
            floats(made.pre_rstd),
            rows.aligned(layout.d) && starts_aligned(made.out) && weights_aligned};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adapter_forward_op(
    const Tensor& x, const Tensor& wd, const Tensor& wg, const Tensor& vectors, const Tensor& scale, const Tensor& root,
    const Tensor& mean, std::optional<Tensor> task_index, int64_t d, int64_t b, bool pre_norm, bool post_norm,
    int64_t activation, bool save) {
  CudaCall call(x, tasks_of(wd), task_index, d, b, pre_norm, post_norm, activation);
  call.use(x, {wd, wg, vectors, scale, root, mean});
  ForwardTensors made = make_results(x, call.layout, save);
  if (x.numel() > 0) {
    const OnDeviceOf device(x);
    const RowView rows(x, call.by_sample());
    forward(call.forward_params(rows, made, save), call.dtype, device.stream);
  }
  return made.tuple();
}

// What one backward needs besides its results, in one allocation: parts that start at multiples of 16 bytes.
class Workspace {
 public:
  // Reserves room; returns where it starts.
  int64_t reserve(int64_t bytes) {
    const int64_t start = size;
    size += (bytes + 15) / 16 * 16;
    return start;
  }
  void allocate(const Tensor& like) { memory = empty({}, {size / 4}, ScalarType::Float, &like); }
  template <class T>
  T* at(int64_t start) {
    return reinterpret_cast<T*>(static_cast<char*>(memory.mutable_data_ptr()) + start);
  }

 private:
  int64_t size = 0;
  Tensor memory;
};

std::tuple<Tensor, Tensor> adapter_backward_op(const Tensor& g, const Tensor& x, const Tensor& z, const Tensor& r,
                                               const Tensor& pre_mean, const Tensor& pre_rstd, const Tensor& packed,
                                               const Tensor& wd, const Tensor& wg, const Tensor& vectors,
                                               const Tensor& scale, const Tensor& root, const Tensor& mean,
                                               std::optional<Tensor> task_index, int64_t d, int64_t b, bool pre_norm,
                                               bool post_norm, int64_t activation, bool need_dx, bool need_dpacked) {
  CudaCall call(x, tasks_of(wd), task_index, d, b, pre_norm, post_norm, activation);
  call.use(x, {wd, wg, vectors, scale, root, mean});
  call.check(g, x, {z, r, pre_mean, pre_rstd}, packed);
  const int64_t T = call.T, P = call.layout.numel();
  expect_device(x, {&g, &z, &r, &pre_mean, &pre_rstd, &packed});
  Tensor dx = need_dx ? empty(lead_of(x), {d}, x.scalar_type(), &x) : empty({}, {0}, x.scalar_type(), &x);
  Tensor dpacked = need_dpacked ? empty({T}, {P}, ScalarType::Float, &x) : empty({}, {0}, ScalarType::Float, &x);
  const OnDeviceOf device(x);
  if (x.numel() == 0) {
    torch::stable::zero_(dpacked);
    return {dx, dpacked};
  }
  const bool by_sample = call.by_sample(), sums = need_dpacked && T > 0;
  if (!need_dx && !sums) return {dx, dpacked};
  const RowView gs(g, by_sample), xs(x, by_sample);
  const int64_t B = call.tasks.B = xs.B, M = call.tasks.M = xs.M;
  const bool aligned = gs.aligned(d) && xs.aligned(d) && starts_aligned(dx) && call.weights_aligned;
  const int64_t units = B * ((M + kUnit - 1) / kUnit);
  Schedule schedule{};
  schedule.share = segment_share(call.adapter, units, call.dtype);
  const int64_t segments = units / schedule.share + (by_sample ? std::min(T, B) : units % schedule.share != 0);
  STD_TORCH_CHECK(!sums || units + T <= INT32_MAX, "too many rows for one backward");
  schedule.segments = int(segments);
  const int64_t sums_of_a_segment = partial_sums(d, b);
  Workspace workspace;
  float* part = nullptr;
  void* records = nullptr;
  if (sums) {
    const int64_t record = record_bytes(int(b), call.dtype, aligned);
    const int64_t records_at = workspace.reserve(B * M * record);
    const int64_t part_at = workspace.reserve(segments * sums_of_a_segment * 4);
    const int64_t segments_at = workspace.reserve(by_sample ? segments * int64_t(sizeof(Segment)) : 0);
    const int64_t tasks_at = workspace.reserve(by_sample ? T * int64_t(sizeof(Run)) : 0);
    const int64_t samples_at = workspace.reserve(by_sample ? B * 4 : 0);
    workspace.allocate(x);
    records = workspace.at<void>(records_at);
    part = workspace.at<float>(part_at);
    if (by_sample) {
      schedule.segment = workspace.at<Segment>(segments_at);
      schedule.of_task = workspace.at<Run>(tasks_at);
      schedule.samples = workspace.at<int>(samples_at);
    }
  }
  const PackedParts at = parts_of(call.layout);
  backward({call.adapter, gs.rows(), xs.rows(), call.tasks, call.folded, z.const_data_ptr(), floats(r),
            floats(pre_mean), floats(pre_rstd), floats(packed), P, at.gamma, need_dx ? dx.mutable_data_ptr() : nullptr,
            records, schedule, aligned},
           call.dtype, device.stream);
  if (!sums) return {dx, dpacked};
  weight_gradients({call.adapter, gs.rows(), xs.rows(), call.tasks, records, floats(pre_mean), floats(pre_rstd),
                    schedule, part, aligned},
                   call.dtype, device.stream);
  finish({call.adapter, part, floats(packed), floats(mean), floats(dpacked), 1, T, at, schedule}, device.stream);
  return {dx, dpacked};
}

// Generation, folding and application of one site in one launch; returns what the three ops return.
HyperAdapterTensors hyper_adapter_op(const Tensor& x, const Tensor& E, const Tensor& G, const Tensor& g0,
                                     std::optional<Tensor> task_index, int64_t d, int64_t b, bool pre_norm,
                                     bool post_norm, int64_t activation, bool save) {
  STD_TORCH_CHECK(E.dim() == 2, "E must be [T, k]");
  const int64_t T = E.size(0), k = E.size(1);
  CudaCall call(x, T, task_index, d, b, pre_norm, post_norm, activation);
  expect_site_generator(call.layout, E, G, g0);
  expect_device(x, {&E, &G, &g0});
  const int64_t P = call.layout.numel();
  Tensor packed = empty({T}, {P}, ScalarType::Float, &x);
  FoldedTensors folded({T}, call.layout, x.scalar_type(), &x);
  call.use(x, folded.arguments());
  ForwardTensors made = make_results(x, call.layout, save);
  const OnDeviceOf device(x);
  const RowView rows(x, call.by_sample());
  site({generate_params(E, G, g0, packed, 1, T, P, k), fold_params(packed, call.layout, folded),
        call.forward_params(rows, made, save)},
       call.dtype, device.stream);
  return hyper_adapter_tensors(made, packed, folded);
}

// The number of devices, or minus the CUDA error where the driver reports one or is absent.
int64_t device_count_op() {
#ifdef HFF_EMULATED
  return 1;
#else
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  (void)cudaGetLastError();
  return error == cudaSuccess ? count : -int64_t(error);
#endif
}

// Sets the number of rows up to which the kernel for few rows serves, and returns the former one.
int64_t use_few_rows_op(int64_t rows) {
  STD_TORCH_CHECK(rows >= 0 && rows <= INT32_MAX, "rows must be from 0 to 2147483647, got ", rows);
  return few_rows.exchange(rows);
}

// The shared memory of a block of one kernel, in bytes; kernels are numbered as in backends/cuda.py's KERNELS.
int64_t shared_bytes_op(int64_t kernel, int64_t d, int64_t b, ScalarType dtype) {
  expect_adapter(d, b);
  const int n = int(b);
  const Dtype compute = compute_dtype("dtype", dtype);
  const int bytes[] = {generate_shared_bytes(),
                       fold_shared_bytes(n),
                       forward_shared_bytes(n, compute),
                       backward_shared_bytes(n, compute),
                       weight_gradients_shared_bytes(n, compute),
                       finish_shared_bytes(n),
                       few_rows_shared_bytes(int(d), n, compute),
                       site_shared_bytes(int(d), n, compute)};
  STD_TORCH_CHECK(kernel >= 0 && kernel < int64_t(std::size(bytes)), "no such kernel: ", kernel);
  return bytes[kernel];
}

}  // namespace

STABLE_TORCH_LIBRARY(HFF_LIBRARY, m) {
  m.def("device_count() -> int");
  m.def("shared_bytes(int kernel, int d, int b, ScalarType dtype) -> int");
  m.def("use_few_rows(int rows) -> int");
  define_ops(m);
}

STABLE_TORCH_LIBRARY_IMPL(HFF_LIBRARY, HFF_DEVICE, m) {
  m.impl("generate_weights", TORCH_BOX(&generate_weights_op));
  m.impl("fold", TORCH_BOX(&fold_op));
  m.impl("adapter_forward", TORCH_BOX(&adapter_forward_op));
  m.impl("adapter_backward", TORCH_BOX(&adapter_backward_op));
  m.impl("hyper_adapter", TORCH_BOX(&hyper_adapter_op));
}

STABLE_TORCH_LIBRARY_IMPL(HFF_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("device_count", TORCH_BOX(&device_count_op));
  m.impl("shared_bytes", TORCH_BOX(&shared_bytes_op));
  m.impl("use_few_rows", TORCH_BOX(&use_few_rows_op));
}

}  // namespace hyperformer_fast

// The raw ops of the CUDA library, through LibTorch's stable ABI. The library links to no CUDA library of torch, so
// that it also loads beside a CPU-only torch. There is no autograd here and there are no fakes: hyperformer_fast/ops/
// has those.
//
// Compiled with HFF_EMULATED, the same ops run the same kernels on CPU tensors, for tests.
#include "backward_op.h"
#include "call.h"

namespace hyperformer_fast {
namespace {

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
          layout.post_norm,
          layout.numel() % 4 == 0 && layout.b * layout.d % 4 == 0 && starts_aligned(packed) && starts_aligned(made.wd)};
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
                       fold_shared_bytes(int(d), n),
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
  m.def(
      "sums_sizes(int B, int M, int T, bool by_sample, int d, int b, bool post_norm, ScalarType dtype)"
      " -> (int segments, int size, int schedule)");
  m.def(
      "adapter_backward_sums(Tensor g, Tensor x, Tensor z, Tensor r, Tensor pre_mean, Tensor pre_rstd, Tensor packed, "
      "Tensor wd, Tensor wg, Tensor vectors, Tensor scale, Tensor root, Tensor mean, Tensor? task_index, int d, int b, "
      "bool pre_norm, bool post_norm, int activation, bool need_dx, Tensor(a!) part, Tensor(b!) schedule) -> Tensor "
      "dx");
  m.def(
      "finish(Tensor part, Tensor schedule, Tensor packed, Tensor mean, bool by_sample, int d, int b, bool pre_norm, "
      "bool post_norm) -> Tensor dpacked");
  define_ops(m);
}

STABLE_TORCH_LIBRARY_IMPL(HFF_LIBRARY, HFF_DEVICE, m) {
  m.impl("generate_weights", TORCH_BOX(&generate_weights_op));
  m.impl("fold", TORCH_BOX(&fold_op));
  m.impl("adapter_forward", TORCH_BOX(&adapter_forward_op));
  m.impl("adapter_backward", TORCH_BOX(&adapter_backward_op));
  m.impl("hyper_adapter", TORCH_BOX(&hyper_adapter_op));
  m.impl("adapter_backward_sums", TORCH_BOX(&adapter_backward_sums_op));
  m.impl("finish", TORCH_BOX(&finish_op));
}

STABLE_TORCH_LIBRARY_IMPL(HFF_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("device_count", TORCH_BOX(&device_count_op));
  m.impl("shared_bytes", TORCH_BOX(&shared_bytes_op));
  m.impl("use_few_rows", TORCH_BOX(&use_few_rows_op));
  m.impl("sums_sizes", TORCH_BOX(&sums_sizes_op));
}

}  // namespace hyperformer_fast

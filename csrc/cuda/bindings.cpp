// The raw ops of the CUDA library, through LibTorch's stable ABI. It links to no CUDA library of torch's, so that it
// loads beside a CPU-only torch too. No autograd and no fakes here; hyperformer_fast/ops.py has those.
//
// With HF_EMULATED the same ops run the same kernels on CPU tensors, for tests.
#include "../tensors.h"
#include "params.h"

#ifdef HF_EMULATED
#define HF_LIBRARY hyperformer_fast_cuda_emulated
#define HF_DEVICE CPU
#else
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#define HF_LIBRARY hyperformer_fast_cuda
#define HF_DEVICE CUDA
#endif

namespace hyperformer_fast {
namespace {

#ifdef HF_EMULATED
struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor&) {}
  void* stream = nullptr;
};
#else
// Makes t's device the current one, and finds torch's current stream there: never the default stream instead.
struct OnDeviceOf {
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;

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
    STABLE_TORCH_ERROR_CODE_CHECK(current(t.get_device_index(), &stream));
  }
};
#endif

Kind kind_of(ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "dtype must be float32, bfloat16 or float16, got ", name(dtype));
  return dtype == ScalarType::Float ? Kind::f32 : dtype == ScalarType::BFloat16 ? Kind::bf16 : Kind::f16;
}

void expect_adapter(int64_t d, int64_t b) {
  expect_sizes(d, b);
  STD_TORCH_CHECK(b <= kLargestBottleneck, "b must be at most ", kLargestBottleneck, ", got ", b);
}

void expect_device(const Tensor& x, std::initializer_list<const Tensor*> others) {
  for (const Tensor* t : others)
    STD_TORCH_CHECK(t->get_device_index() == x.get_device_index(), "all tensors must be on one device, ",
                    x.get_device_index(), ", got one on ", t->get_device_index());
}

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

bool starts_aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

// packed [Q, n, P] of E [Q, n, k], G [Q, P, k] and g0 [Q, P].
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

using FoldedTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

PackedParts parts_of(const AdapterLayout& layout) {
  return {layout.numel(),   layout.down_bias(),  layout.up_weight(),
          layout.up_bias(), layout.post_gamma(), layout.pre_gamma()};
}

FoldedTensors make_folded(const Tensor& packed, const AdapterLayout& layout, ScalarType dtype) {
  const std::vector<int64_t> lead = lead_of(packed);
  const int64_t d = layout.d, b = layout.b, n = layout.post_norm ? b + 1 : 0;
  const auto make = [&](std::initializer_list<int64_t> tail, ScalarType type) {
    return empty(lead, tail, type, &packed);
  };
  constexpr ScalarType exact = ScalarType::Float;
  return {make({b, d}, dtype),      make({b, d}, dtype), make({layout.vectors()}, exact),
          make({n ? b : 0}, exact), make({n, n}, exact), make({n}, exact)};
}

FoldParams fold_params(const Tensor& packed, const AdapterLayout& layout, FoldedTensors& made) {
  auto& [wd, wg, vectors, scale, root, mean] = made;
  const int64_t M = packed.numel() / layout.numel();
  return {floats(packed),   wd.mutable_data_ptr(), wg.mutable_data_ptr(), floats(vectors),
          floats(scale),    floats(root),          floats(mean),          M,
          layout.vectors(), parts_of(layout),      int(layout.d),         int(layout.b),
          layout.pre_norm,  layout.post_norm};
}

FoldedTensors fold_op(const Tensor& packed, int64_t d, int64_t b, bool pre_norm, bool post_norm, ScalarType dtype) {
  expect_adapter(d, b);
  const AdapterLayout layout{d, b, pre_norm, post_norm};
  const Kind kind = kind_of(dtype);
  std::vector<int64_t> whole = lead_of(packed);
  whole.push_back(layout.numel());
  expect("packed", packed, ScalarType::Float, whole);
  FoldedTensors made = make_folded(packed, layout, dtype);
  if (packed.numel() > 0) {
    const OnDeviceOf device(packed);
    fold(fold_params(packed, layout, made), kind, device.stream);
  }
  return made;
}

// x's rows as B samples of M rows with a common stride; a tensor that has none is copied once.
struct RowView {
  Tensor keep;
  int64_t B = 1, M = 1, stride_sample = 0, stride_row = 0;

  RowView(const Tensor& t, bool by_sample) : keep(t) {
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
    if (keep.size(dims) > 1 && keep.stride(dims) != 1) return false;
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

struct ForwardTensors {
  Tensor out, z, r, pre_mean, pre_rstd;

  ForwardTensors(const Tensor& x, const AdapterLayout& layout, bool save)
      : out(empty(lead_of(x), {layout.d}, x.scalar_type(), &x)),
        z(empty(save ? lead_of(x) : Sizes{}, {save ? layout.b : 0}, x.scalar_type(), &x)),
        r(statistic(x, save && layout.post_norm)),
        pre_mean(statistic(x, save && layout.pre_norm)),
        pre_rstd(statistic(x, save && layout.pre_norm)) {}

 private:
  using Sizes = std::vector<int64_t>;
  static Tensor statistic(const Tensor& x, bool on) {
    return on ? empty(lead_of(x), {}, ScalarType::Float, &x) : empty({}, {0}, ScalarType::Float, &x);
  }
};

// What every kernel over rows is told of a call, checked.
struct Call {
  AdapterLayout layout;
  Kind kind;
  Adapter adapter;
  Tasks tasks{};
  Folded folded{};
  std::optional<Tensor> index;
  bool weights_aligned = false;

  Call(const Tensor& x, int64_t T, std::optional<Tensor> task_index, int64_t d, int64_t b, bool pre_norm,
       bool post_norm, int64_t activation)
      : layout{d, b, pre_norm, post_norm}, kind(kind_of(x.scalar_type())), index(std::move(task_index)) {
    expect_adapter(d, b);
    expect_rows(x, T, index, d, b, activation);
    adapter = {int(d), int(b), int(activation), pre_norm, post_norm};
    tasks.T = T;
    if (!index.has_value()) return;
    expect_device(x, {&*index});
    if (!index->is_contiguous()) index = torch::stable::contiguous(*index);
    tasks.index = index->const_data_ptr();
    tasks.wide = index->scalar_type() == ScalarType::Long;
  }

  void use(const Tensor& x, const Tensor& wd, const Tensor& wg, const Tensor& vectors, const Tensor& scale,
           const Tensor& root, const Tensor& mean) {
    expect_folded(layout, tasks.T, x.scalar_type(), wd, wg, vectors, scale, root, mean);
    expect_device(x, {&wd, &wg, &vectors, &scale, &root, &mean});
    folded = {wd.const_data_ptr(), wg.const_data_ptr(), floats(vectors), floats(scale), floats(root)};
    weights_aligned = starts_aligned(wd) && starts_aligned(wg);
  }

  ForwardParams forward_params(const RowView& rows, ForwardTensors& made, bool save) {
    tasks.B = rows.B, tasks.M = rows.M;
    auto& [out, z, r, pre_mean, pre_rstd] = made;
    const bool aligned = rows.aligned(layout.d) && starts_aligned(out) && weights_aligned;
    return {adapter,
            rows.rows(),
            tasks,
            folded,
            out.mutable_data_ptr(),
            save ? z.mutable_data_ptr() : nullptr,
            floats(r),
            floats(pre_mean),
            floats(pre_rstd),
            aligned};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adapter_forward_op(
    const Tensor& x, const Tensor& wd, const Tensor& wg, const Tensor& vectors, const Tensor& scale, const Tensor& root,
    const Tensor& mean, std::optional<Tensor> task_index, int64_t d, int64_t b, bool pre_norm, bool post_norm,
    int64_t activation, bool save) {
  Call call(x, tasks_of(wd), task_index, d, b, pre_norm, post_norm, activation);
  call.use(x, wd, wg, vectors, scale, root, mean);
  ForwardTensors made(x, call.layout, save);
  if (x.numel() > 0) {
    const OnDeviceOf device(x);
    const RowView rows(x, call.index.has_value());
    forward(call.forward_params(rows, made, save), call.kind, device.stream);
  }
  return {made.out, made.z, made.r, made.pre_mean, made.pre_rstd};
}

std::tuple<Tensor, Tensor> adapter_backward_op(const Tensor& g, const Tensor& x, const Tensor& z, const Tensor& r,
                                               const Tensor& pre_mean, const Tensor& pre_rstd, const Tensor& packed,
                                               const Tensor& wd, const Tensor& wg, const Tensor& vectors,
                                               const Tensor& scale, const Tensor& root, const Tensor& mean,
                                               std::optional<Tensor> task_index, int64_t d, int64_t b, bool pre_norm,
                                               bool post_norm, int64_t activation, bool need_dx, bool need_dpacked) {
  Call call(x, tasks_of(wd), task_index, d, b, pre_norm, post_norm, activation);
  call.use(x, wd, wg, vectors, scale, root, mean);
  expect_gradient(g, x);
  expect_saved(call.layout, x, z, r, pre_mean, pre_rstd);
  const int64_t T = call.tasks.T, P = call.layout.numel();
  expect("packed", packed, ScalarType::Float, {T, P});
  expect_device(x, {&g, &z, &r, &pre_mean, &pre_rstd, &packed});
  const std::vector<int64_t> none;
  Tensor dx = need_dx ? empty(lead_of(x), {d}, x.scalar_type(), &x) : empty(none, {0}, x.scalar_type(), &x);
  Tensor dpacked = need_dpacked ? empty({T}, {P}, ScalarType::Float, &x) : empty(none, {0}, ScalarType::Float, &x);
  const OnDeviceOf device(x);
  if (x.numel() == 0) {
    torch::stable::zero_(dpacked);
    return {dx, dpacked};
  }
  const bool by_sample = call.index.has_value(), sums = need_dpacked && T > 0;
  if (!need_dx && !sums) return {dx, dpacked};
  const RowView gs(g, by_sample), xs(x, by_sample);
  const int64_t B = call.tasks.B = xs.B, M = call.tasks.M = xs.M;
  const bool aligned = gs.aligned(d) && xs.aligned(d) && starts_aligned(dx) && call.weights_aligned;
  const PackedParts at = parts_of(call.layout);
  Tensor dz = empty(none, {sums ? B * M * b : 0}, x.scalar_type(), &x);
  Tensor m2 = empty(none, {sums && post_norm ? B * M : 0}, ScalarType::Float, &x);
  Tensor s = empty(none, {sums && post_norm ? B * M : 0}, ScalarType::Float, &x);
  backward({call.adapter, gs.rows(), xs.rows(), call.tasks, call.folded, z.const_data_ptr(), floats(r),
            floats(pre_mean), floats(pre_rstd), floats(packed), P, at.gamma, need_dx ? dx.mutable_data_ptr() : nullptr,
            sums ? dz.mutable_data_ptr() : nullptr, floats(m2), floats(s), aligned},
           call.kind, device.stream);
  if (!sums) return {dx, dpacked};
  const int64_t units = B * ((M + kUnit - 1) / kUnit), wanted = stretches(call.adapter, units, T, call.kind);
  const int64_t units_per_split = (units + wanted - 1) / wanted,
                splits = (units + units_per_split - 1) / units_per_split;
  Tensor part = empty({splits, T}, {partial_sums(d, b)}, ScalarType::Float, &x);
  weight_gradients(
      {call.adapter, gs.rows(), xs.rows(), call.tasks, z.const_data_ptr(), dz.const_data_ptr(), floats(r),
       floats(pre_mean), floats(pre_rstd), floats(m2), floats(s), floats(part), int(splits), units_per_split, aligned},
      call.kind, device.stream);
  finish({call.adapter, floats(part), floats(packed), floats(mean), floats(dpacked), T, at, int(splits)},
         device.stream);
  return {dx, dpacked};
}

using HyperAdapter =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Generation, folding and application of one site in one launch: what the three ops give.
HyperAdapter hyper_adapter_op(const Tensor& x, const Tensor& E, const Tensor& G, const Tensor& g0,
                              std::optional<Tensor> task_index, int64_t d, int64_t b, bool pre_norm, bool post_norm,
                              int64_t activation, bool save) {
  STD_TORCH_CHECK(E.dim() == 2, "E must be [T, k]");
  const int64_t T = E.size(0), k = E.size(1);
  Call call(x, T, task_index, d, b, pre_norm, post_norm, activation);
  expect_site_generator(call.layout, E, G, g0);
  expect_device(x, {&E, &G, &g0});
  const int64_t P = call.layout.numel();
  Tensor packed = empty({T}, {P}, ScalarType::Float, &x);
  FoldedTensors folded = make_folded(packed, call.layout, x.scalar_type());
  auto& [wd, wg, vectors, scale, root, mean] = folded;
  call.use(x, wd, wg, vectors, scale, root, mean);
  ForwardTensors made(x, call.layout, save);
  const OnDeviceOf device(x);
  const RowView rows(x, call.index.has_value());
  site({generate_params(E, G, g0, packed, 1, T, P, k), fold_params(packed, call.layout, folded),
        call.forward_params(rows, made, save)},
       call.kind, device.stream);
  return {made.out, made.z, made.r, made.pre_mean, made.pre_rstd, packed, wd, wg, vectors, scale, root, mean};
}

// How many devices the driver gives; below zero the CUDA error, as where there is no driver.
int64_t device_count_op() {
#ifdef HF_EMULATED
  return 1;
#else
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  (void)cudaGetLastError();
  return error == cudaSuccess ? count : -int64_t(error);
#endif
}

// Sets up to how many rows the kernel for few rows serves; returns what it was.
int64_t use_few_rows_op(int64_t rows) {
  STD_TORCH_CHECK(rows >= 0 && rows <= INT32_MAX, "rows must be from 0 to 2147483647, got ", rows);
  return few_rows.exchange(rows);
}

// Of a block, in the order of backends/cuda.py's KERNELS.
int64_t shared_bytes_op(int64_t kernel, int64_t d, int64_t b, ScalarType dtype) {
  expect_adapter(d, b);
  const int n = int(b);
  const Kind kind = kind_of(dtype);
  const int bytes[] = {generate_shared_bytes(),
                       fold_shared_bytes(n),
                       forward_shared_bytes(n, kind),
                       backward_shared_bytes(n, kind),
                       weight_gradients_shared_bytes(n, kind),
                       finish_shared_bytes(n),
                       few_rows_shared_bytes(int(d), n, kind),
                       site_shared_bytes(int(d), n, kind)};
  STD_TORCH_CHECK(kernel >= 0 && kernel < int64_t(std::size(bytes)), "no such kernel: ", kernel);
  return bytes[kernel];
}

}  // namespace

STABLE_TORCH_LIBRARY(HF_LIBRARY, m) {
  m.def("device_count() -> int");
  m.def("shared_bytes(int kernel, int d, int b, ScalarType dtype) -> int");
  m.def("use_few_rows(int rows) -> int");
  define_ops(m);
}

STABLE_TORCH_LIBRARY_IMPL(HF_LIBRARY, HF_DEVICE, m) {
  m.impl("generate_weights", TORCH_BOX(&generate_weights_op));
  m.impl("fold", TORCH_BOX(&fold_op));
  m.impl("adapter_forward", TORCH_BOX(&adapter_forward_op));
  m.impl("adapter_backward", TORCH_BOX(&adapter_backward_op));
  m.impl("hyper_adapter", TORCH_BOX(&hyper_adapter_op));
}

STABLE_TORCH_LIBRARY_IMPL(HF_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("device_count", TORCH_BOX(&device_count_op));
  m.impl("shared_bytes", TORCH_BOX(&shared_bytes_op));
  m.impl("use_few_rows", TORCH_BOX(&use_few_rows_op));
}

}  // namespace hyperformer_fast

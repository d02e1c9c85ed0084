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

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

Tensor generate_weights_op(const Tensor& E, const Tensor& G, const Tensor& g0) {
  STD_TORCH_CHECK(E.dim() == 3 && G.dim() == 3, "E must be [Q, n, k] and G [Q, P, k]");
  const int64_t Q = E.size(0), n = E.size(1), k = E.size(2), P = G.size(1);
  expect("E", E, ScalarType::Float, {Q, n, k});
  expect("G", G, ScalarType::Float, {Q, P, k});
  expect("g0", g0, ScalarType::Float, {Q, P});
  Tensor packed = empty({Q}, {n, P}, ScalarType::Float, &E);
  if (Q * n * P == 0) return packed;
  const OnDeviceOf device(E);
  generate({floats(E), floats(G), floats(g0), floats(packed), Q, n, P, k}, device.stream);
  return packed;
}

using Folded = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Folded fold_op(const Tensor& packed, int64_t d, int64_t b, bool pre_norm, bool post_norm, ScalarType dtype) {
  expect_adapter(d, b);
  const AdapterLayout layout{d, b, pre_norm, post_norm};
  const Kind kind = kind_of(dtype);
  const std::vector<int64_t> lead = lead_of(packed);
  std::vector<int64_t> whole(lead);
  whole.push_back(layout.numel());
  expect("packed", packed, ScalarType::Float, whole);
  const int64_t n = post_norm ? b + 1 : 0;
  Tensor wd = empty(lead, {b, d}, dtype, &packed), wg = empty(lead, {b, d}, dtype, &packed);
  const auto make = [&](std::initializer_list<int64_t> tail) { return empty(lead, tail, ScalarType::Float, &packed); };
  Tensor vectors = make({layout.vectors()}), scale = make({post_norm ? b : 0}), root = make({n, n}), mean = make({n});
  int64_t M = 1;
  for (const int64_t size : lead) M *= size;
  if (M > 0) {
    const OnDeviceOf device(packed);
    fold({floats(packed), wd.mutable_data_ptr(), wg.mutable_data_ptr(), floats(vectors), floats(scale), floats(root),
          floats(mean), M, layout.numel(), layout.vectors(), layout.down_bias(), layout.up_weight(), layout.up_bias(),
          layout.post_gamma(), layout.pre_gamma(), int(d), int(b), pre_norm, post_norm},
         kind, device.stream);
  }
  return {wd, wg, vectors, scale, root, mean};
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

  bool aligned(int64_t d) const {
    const int64_t bytes = keep.scalar_type() == ScalarType::Float ? 4 : 2;
    return reinterpret_cast<uintptr_t>(keep.const_data_ptr()) % 16 == 0 && d * bytes % 16 == 0 &&
           stride_sample * bytes % 16 == 0 && stride_row * bytes % 16 == 0;
  }
};

bool starts_aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adapter_forward_op(
    const Tensor& x, const Tensor& wd, const Tensor& wg, const Tensor& vectors, const Tensor& scale, const Tensor& root,
    const Tensor& mean, std::optional<Tensor> task_index, int64_t d, int64_t b, bool pre_norm, bool post_norm,
    int64_t activation, bool save) {
  expect_adapter(d, b);
  const ScalarType dtype = x.scalar_type();
  const Kind kind = kind_of(dtype);
  const int64_t T = tasks_of(wd);
  expect_folded({d, b, pre_norm, post_norm}, T, dtype, wd, wg, vectors, scale, root, mean);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == d, "x must be [..., ", d, "]");
  STD_TORCH_CHECK(activation >= 0 && activation <= 3, "activation must be from 0 to 3, got ", activation);
  STD_TORCH_CHECK(task_index.has_value() || T == 1, "weights of ", T, " tasks need a task_index");
  for (const Tensor* t : {&wd, &wg, &vectors, &scale, &root, &mean})
    STD_TORCH_CHECK(t->get_device_index() == x.get_device_index(), "all tensors must be on x's device");
  bool wide = false;
  if (task_index.has_value()) {
    wide = task_index->scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(wide || task_index->scalar_type() == ScalarType::Int, "task_index must be int32 or int64");
    STD_TORCH_CHECK(x.dim() >= 2 && task_index->dim() == 1 && task_index->size(0) == x.size(0),
                    "task_index must have one entry per sample of x");
    STD_TORCH_CHECK(task_index->get_device_index() == x.get_device_index(), "task_index must be on x's device");
    if (!task_index->is_contiguous()) task_index = torch::stable::contiguous(*task_index);
  }
  const std::vector<int64_t> lead = lead_of(x), none;
  Tensor out = empty(lead, {d}, dtype, &x), z = save ? empty(lead, {b}, dtype, &x) : empty(none, {0}, dtype, &x);
  const auto statistic = [&](bool on) {
    return save && on ? empty(lead, {}, ScalarType::Float, &x) : empty(none, {0}, ScalarType::Float, &x);
  };
  Tensor r = statistic(post_norm), pre_mean = statistic(pre_norm), pre_rstd = statistic(pre_norm);
  if (out.numel() == 0) return {out, z, r, pre_mean, pre_rstd};
  const OnDeviceOf device(x);
  const RowView rows(x, task_index.has_value());
  const bool aligned = rows.aligned(d) && starts_aligned(out) && starts_aligned(wd) && starts_aligned(wg);
  forward({rows.keep.const_data_ptr(),
           rows.stride_sample,
           rows.stride_row,
           out.mutable_data_ptr(),
           save ? z.mutable_data_ptr() : nullptr,
           floats(r),
           floats(pre_mean),
           floats(pre_rstd),
           wd.const_data_ptr(),
           wg.const_data_ptr(),
           floats(vectors),
           floats(scale),
           floats(root),
           task_index.has_value() ? task_index->const_data_ptr() : nullptr,
           wide,
           rows.B,
           rows.M,
           T,
           int(d),
           int(b),
           int(activation),
           pre_norm,
           post_norm,
           aligned},
          kind, device.stream);
  return {out, z, r, pre_mean, pre_rstd};
}

// How many devices the driver gives; below zero the CUDA error, as where there is no driver.
int64_t device_count_op() {
#ifdef HF_EMULATED
  return 1;
#else
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  return error == cudaSuccess ? count : -int64_t(error);
#endif
}

int64_t forward_shared_bytes_op(int64_t b, ScalarType dtype) {
  expect_adapter(1, b);
  return forward_shared_bytes(int(b), kind_of(dtype));
}

}  // namespace

STABLE_TORCH_LIBRARY(HF_LIBRARY, m) {
  m.def("device_count() -> int");
  m.def("forward_shared_bytes(int b, ScalarType dtype) -> int");
  m.def("generate_weights(Tensor E, Tensor G, Tensor g0) -> Tensor packed");
  m.def(
      "fold(Tensor packed, int d, int b, bool pre_norm, bool post_norm, ScalarType dtype)"
      " -> (Tensor wd, Tensor wg, Tensor vectors, Tensor scale, Tensor root, Tensor mean)");
  m.def(
      "adapter_forward(Tensor x, Tensor wd, Tensor wg, Tensor vectors, Tensor scale, Tensor root, Tensor mean, "
      "Tensor? task_index, int d, int b, bool pre_norm, bool post_norm, int activation, bool save)"
      " -> (Tensor out, Tensor z, Tensor r, Tensor pre_mean, Tensor pre_rstd)");
}

STABLE_TORCH_LIBRARY_IMPL(HF_LIBRARY, HF_DEVICE, m) {
  m.impl("generate_weights", TORCH_BOX(&generate_weights_op));
  m.impl("fold", TORCH_BOX(&fold_op));
  m.impl("adapter_forward", TORCH_BOX(&adapter_forward_op));
}

STABLE_TORCH_LIBRARY_IMPL(HF_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("device_count", TORCH_BOX(&device_count_op));
  m.impl("forward_shared_bytes", TORCH_BOX(&forward_shared_bytes_op));
}

}  // namespace hyperformer_fast

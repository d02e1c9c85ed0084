// A call of the CUDA library's ops: its device and stream, its rows, its arguments as the kernels take them.
#pragma once

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

PackedParts parts_of(const AdapterLayout& layout) {
  return {layout.numel(),   layout.down_bias(),  layout.up_weight(),
          layout.up_bias(), layout.post_gamma(), layout.pre_gamma()};
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

}  // namespace
}  // namespace hyperformer_fast

// What the bindings of both libraries share: tensors made, checked and viewed through LibTorch's stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "layout.h"

namespace hyperformer_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

inline const char* name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    default:
      return "another dtype";
  }
}

// The dtype of argument `what`, one that the kernels compute in.
inline Dtype compute_dtype(const char* what, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, what, " must be float32, bfloat16 or float16, got ", name(dtype));
      return Dtype::kFloat32;
  }
}

// A tensor on the CPU, or where `like` is. torch::stable::empty would do the same, but its trip through the dispatcher
// costs microseconds.
inline Tensor empty_strided(const Sizes& sizes, const Sizes& strides, ScalarType dtype, const Tensor* like = nullptr) {
  const int32_t code = dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                       : dtype == ScalarType::Half   ? aoti_torch_dtype_float16()
                                                     : aoti_torch_dtype_float32();
  AtenTensorHandle handle;
  int32_t type = aoti_torch_device_type_cpu(), index = 0;
  if (like != nullptr) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like->get(), &type));
    index = like->get_device_index();
  }
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), code, type, index, &handle));
  return Tensor(handle);
}

// A contiguous tensor [lead..., tail...], likewise.
inline Tensor empty(const Sizes& lead, std::initializer_list<int64_t> tail, ScalarType dtype,
                    const Tensor* like = nullptr) {
  Sizes sizes(lead);
  sizes.insert(sizes.end(), tail);
  Sizes strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  return empty_strided(sizes, strides, dtype, like);
}

inline const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
inline float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// The sizes of the rows of t [..., d]. A tensor without dimensions, which Call refuses, has none.
inline Sizes lead_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.begin() + (sizes.size() == 0 ? 0 : sizes.size() - 1)};
}

// t [..., d] itself where its last dimension is contiguous, else a copy.
inline Tensor dense_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) > 1 && t.stride(last) != 1 ? torch::stable::contiguous(t) : t;
}

// Throws unless t is contiguous, of this dtype and shape. Kernels trust their arguments: the checks below are the last
// place where wrong ones become an exception.
inline void expect(const char* what, const Tensor& t, ScalarType dtype, const Sizes& shape) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, what, " must be ", name(dtype), ", got ", name(t.scalar_type()));
  STD_TORCH_CHECK(t.is_contiguous(), what, " must be contiguous");
  const auto sizes = t.sizes();
  bool same = sizes.size() == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) same = sizes[i] == shape[i];
  STD_TORCH_CHECK(same, what, " has the wrong shape for its adapter");
}

inline void expect_sizes(int64_t d, int64_t b) {
  STD_TORCH_CHECK(d >= 1 && b >= 1 && d < kSizeLimit && b < kSizeLimit, "d and b must be from 1 to ", kSizeLimit - 1,
                  ", got ", d, " and ", b);
}

// T, the first size of the folded weights.
inline int64_t tasks_of(const Tensor& wd) {
  STD_TORCH_CHECK(wd.dim() == 3, "wd must be [T, b, d], got ", wd.dim(), " dimensions");
  return wd.size(0);
}

// The folded weights of a call, as an op receives them.
struct FoldedArguments {
  const Tensor &wd, &wg, &vectors, &scale, &root, &mean;
};

// Folded weights that an op returns: those of `lead` adapters.
struct FoldedTensors {
  Tensor wd, wg, vectors, scale, root, mean;

  FoldedTensors(const Sizes& lead, const AdapterLayout& l, ScalarType dtype, const Tensor* like = nullptr)
      : wd(empty(lead, {l.b, l.d}, dtype, like)),
        wg(empty(lead, {l.b, l.d}, dtype, like)),
        vectors(empty(lead, {l.vectors()}, ScalarType::Float, like)),
        scale(empty(lead, {l.post_norm ? l.b : 0}, ScalarType::Float, like)),
        root(empty(lead, {l.post_norm ? l.b + 1 : 0, l.post_norm ? l.b + 1 : 0}, ScalarType::Float, like)),
        mean(empty(lead, {l.post_norm ? l.b + 1 : 0}, ScalarType::Float, like)) {}

  FoldedArguments arguments() const { return {wd, wg, vectors, scale, root, mean}; }
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> tuple() const {
    return {wd, wg, vectors, scale, root, mean};
  }
};

// What a backward needs of its forward, as an op receives it.
struct SavedArguments {
  const Tensor &z, &r, &pre_mean, &pre_rstd;
};

// What a forward returns. Without `save`, everything but `out` is empty; so are the statistics of a norm that is off.
struct ForwardTensors {
  Tensor out, z, r, pre_mean, pre_rstd;

  ForwardTensors(Tensor out, const Tensor& x, const AdapterLayout& l, bool save, const Tensor* like = nullptr)
      : out(std::move(out)),
        z(save ? empty(lead_of(x), {l.b}, x.scalar_type(), like) : empty({}, {0}, x.scalar_type(), like)),
        r(statistic(x, save && l.post_norm, like)),
        pre_mean(statistic(x, save && l.pre_norm, like)),
        pre_rstd(statistic(x, save && l.pre_norm, like)) {}

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tuple() const { return {out, z, r, pre_mean, pre_rstd}; }

 private:
  static Tensor statistic(const Tensor& x, bool on, const Tensor* like) {
    return on ? empty(lead_of(x), {}, ScalarType::Float, like) : empty({}, {0}, ScalarType::Float, like);
  }
};

// What hyper_adapter returns: the forward's five tensors, the packed weights, the six folded ones.
using HyperAdapterTensors =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
inline HyperAdapterTensors hyper_adapter_tensors(const ForwardTensors& forward, const Tensor& packed,
                                                 const FoldedTensors& folded) {
  return std::tuple_cat(forward.tuple(), std::tuple<Tensor>(packed), folded.tuple());
}

// A call on the rows of x [..., d] with the weights of T tasks, its arguments checked.
struct Call {
  AdapterLayout layout;
  ScalarType scalar_type;  // of x
  Dtype dtype;             // the same, as the kernels know it
  Activation activation;
  int64_t T;
  std::optional<Tensor> index;  // the task of each sample, contiguous; absent where all rows are task 0's

  Call(const Tensor& x, int64_t T, const std::optional<Tensor>& task_index, int64_t d, int64_t b, bool pre_norm,
       bool post_norm, int64_t activation)
      : layout{d, b, pre_norm, post_norm},
        scalar_type(x.scalar_type()),
        dtype(compute_dtype("x", scalar_type)),
        activation(Activation(activation)),
        T(T) {
    expect_sizes(d, b);
    STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == d, "x must be [..., ", d, "]");
    STD_TORCH_CHECK(activation >= 0 && activation <= 3, "activation must be from 0 to 3, got ", activation);
    STD_TORCH_CHECK(task_index.has_value() || T == 1, "weights of ", T, " tasks need a task_index");
    if (!task_index.has_value()) return;
    const ScalarType kind = task_index->scalar_type();
    STD_TORCH_CHECK(kind == ScalarType::Long || kind == ScalarType::Int, "task_index must be int32 or int64");
    STD_TORCH_CHECK(x.dim() >= 2 && task_index->dim() == 1 && task_index->size(0) == x.size(0),
                    "task_index must have one entry per sample of x");
    index = task_index->is_contiguous() ? *task_index : torch::stable::contiguous(*task_index);
  }

  bool by_sample() const { return index.has_value(); }
  bool index_is_wide() const { return index->scalar_type() == ScalarType::Long; }

  void check(const FoldedArguments& f) const {
    const int64_t d = layout.d, b = layout.b, c = layout.post_norm ? b + 1 : 0;
    expect("wd", f.wd, scalar_type, {T, b, d});
    expect("wg", f.wg, scalar_type, {T, b, d});
    expect("vectors", f.vectors, ScalarType::Float, {T, layout.vectors()});
    expect("scale", f.scale, ScalarType::Float, {T, layout.post_norm ? b : 0});
    expect("root", f.root, ScalarType::Float, {T, c, c});
    expect("mean", f.mean, ScalarType::Float, {T, c});
  }

  // The further arguments of a backward; x is the one of the constructor.
  void check(const Tensor& g, const Tensor& x, const SavedArguments& saved, const Tensor& packed) const {
    expect("packed", packed, ScalarType::Float, {T, layout.numel()});
    const Sizes lead = lead_of(x);
    Sizes z_shape(lead);
    z_shape.push_back(layout.b);
    expect("z", saved.z, scalar_type, z_shape);
    if (layout.post_norm) expect("r", saved.r, ScalarType::Float, lead);
    if (layout.pre_norm) {
      expect("pre_mean", saved.pre_mean, ScalarType::Float, lead);
      expect("pre_rstd", saved.pre_rstd, ScalarType::Float, lead);
    }
    STD_TORCH_CHECK(g.scalar_type() == scalar_type && g.dim() == x.dim(), "g must have x's dtype and shape");
    for (int64_t i = 0; i < x.dim(); ++i) STD_TORCH_CHECK(g.size(i) == x.size(i), "g must have x's dtype and shape");
  }
};

inline void expect_generator(const Tensor& E, const Tensor& G, const Tensor& g0) {
  STD_TORCH_CHECK(E.dim() == 3 && G.dim() == 3, "E must be [Q, n, k] and G [Q, P, k]");
  const int64_t Q = E.size(0), n = E.size(1), k = E.size(2), P = G.size(1);
  expect("E", E, ScalarType::Float, {Q, n, k});
  expect("G", G, ScalarType::Float, {Q, P, k});
  expect("g0", g0, ScalarType::Float, {Q, P});
}

// The generator of one site's adapters.
inline void expect_site_generator(const AdapterLayout& layout, const Tensor& E, const Tensor& G, const Tensor& g0) {
  STD_TORCH_CHECK(E.dim() == 2, "E must be [T, k]");
  const int64_t T = E.size(0), k = E.size(1), P = layout.numel();
  expect("E", E, ScalarType::Float, {T, k});
  expect("G", G, ScalarType::Float, {P, k});
  expect("g0", g0, ScalarType::Float, {P});
}

// The raw ops that both libraries have: one schema, as backends/cpu.py and backends/cuda.py call them.
template <class Library>
void define_ops(Library& m) {
  m.def("generate_weights(Tensor E, Tensor G, Tensor g0) -> Tensor packed");
  m.def(
      "fold(Tensor packed, int d, int b, bool pre_norm, bool post_norm, ScalarType dtype)"
      " -> (Tensor wd, Tensor wg, Tensor vectors, Tensor scale, Tensor root, Tensor mean)");
  m.def(
      "adapter_forward(Tensor x, Tensor wd, Tensor wg, Tensor vectors, Tensor scale, Tensor root, Tensor mean, "
      "Tensor? task_index, int d, int b, bool pre_norm, bool post_norm, int activation, bool save)"
      " -> (Tensor out, Tensor z, Tensor r, Tensor pre_mean, Tensor pre_rstd)");
  m.def(
      "adapter_backward(Tensor g, Tensor x, Tensor z, Tensor r, Tensor pre_mean, Tensor pre_rstd, Tensor packed, "
      "Tensor wd, Tensor wg, Tensor vectors, Tensor scale, Tensor root, Tensor mean, Tensor? task_index, "
      "int d, int b, bool pre_norm, bool post_norm, int activation, bool need_dx, bool need_dpacked)"
      " -> (Tensor dx, Tensor dpacked)");
  m.def(
      "hyper_adapter(Tensor x, Tensor E, Tensor G, Tensor g0, Tensor? task_index, int d, int b, bool pre_norm, "
      "bool post_norm, int activation, bool save)"
      " -> (Tensor out, Tensor z, Tensor r, Tensor pre_mean, Tensor pre_rstd, Tensor packed, Tensor wd, Tensor wg, "
      "Tensor vectors, Tensor scale, Tensor root, Tensor mean)");
}

}  // namespace hyperformer_fast

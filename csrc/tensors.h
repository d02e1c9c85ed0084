// What the bindings of the libraries share: tensors made and checked through LibTorch's stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "adapter.h"

namespace hyperformer_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int32_t code(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    default:
      return aoti_torch_dtype_float32();
  }
}

// [lead..., tail...], contiguous; on the CPU, or where `like` is. Not torch::stable::empty, whose trip through the
// dispatcher costs microseconds.
inline Tensor empty(const std::vector<int64_t>& lead, std::initializer_list<int64_t> tail, ScalarType dtype,
                    const Tensor* like = nullptr) {
  std::vector<int64_t> sizes(lead);
  sizes.insert(sizes.end(), tail);
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  AtenTensorHandle handle;
  int32_t type = aoti_torch_device_type_cpu(), index = 0;
  if (like != nullptr) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like->get(), &type));
    index = like->get_device_index();
  }
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), code(dtype), type, index, &handle));
  return Tensor(handle);
}

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

// Kernels trust their arguments; this is the last place where wrong ones become an exception.
inline void expect(const char* what, const Tensor& t, ScalarType dtype, const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, what, " must be ", name(dtype), ", got ", name(t.scalar_type()));
  STD_TORCH_CHECK(t.is_contiguous(), what, " must be contiguous");
  const auto sizes = t.sizes();
  bool same = sizes.size() == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) same = sizes[i] == shape[i];
  STD_TORCH_CHECK(same, what, " has the wrong shape for its adapter");
}

// Sizes of the rows of a [..., d] tensor; of one without dimensions, which problem_of refuses, none.
inline std::vector<int64_t> lead_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.begin() + (sizes.size() == 0 ? 0 : sizes.size() - 1)};
}

// T, the first size of the folded weights.
inline int64_t tasks_of(const Tensor& wd) {
  STD_TORCH_CHECK(wd.dim() == 3, "wd must be [T, b, d], got ", wd.dim(), " dimensions");
  return wd.size(0);
}

inline void expect_folded(const AdapterLayout& layout, int64_t T, ScalarType dtype, const Tensor& wd, const Tensor& wg,
                          const Tensor& vectors, const Tensor& scale, const Tensor& root, const Tensor& mean) {
  const int64_t d = layout.d, b = layout.b, c = layout.post_norm ? b + 1 : 0;
  expect("wd", wd, dtype, {T, b, d});
  expect("wg", wg, dtype, {T, b, d});
  expect("vectors", vectors, ScalarType::Float, {T, layout.vectors()});
  expect("scale", scale, ScalarType::Float, {T, layout.post_norm ? b : 0});
  expect("root", root, ScalarType::Float, {T, c, c});
  expect("mean", mean, ScalarType::Float, {T, c});
}

// d and b below 2^24 keep every size of order d * b * 8 bytes far from overflow.
inline void expect_sizes(int64_t d, int64_t b) {
  STD_TORCH_CHECK(d >= 1 && b >= 1 && d < (1 << 24) && b < (1 << 24), "d and b must be from 1 to 16777215, got ", d,
                  " and ", b);
}

// The rows of a call on either library: x [..., d], and the task of each of its samples.
inline void expect_rows(const Tensor& x, int64_t T, const std::optional<Tensor>& task_index, int64_t d, int64_t b,
                        int64_t activation) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "x must be float32, bfloat16 or float16, got ", name(dtype));
  expect_sizes(d, b);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == d, "x must be [..., ", d, "]");
  STD_TORCH_CHECK(activation >= 0 && activation <= 3, "activation must be from 0 to 3, got ", activation);
  STD_TORCH_CHECK(task_index.has_value() || T == 1, "weights of ", T, " tasks need a task_index");
  if (!task_index.has_value()) return;
  const ScalarType kind = task_index->scalar_type();
  STD_TORCH_CHECK(kind == ScalarType::Long || kind == ScalarType::Int, "task_index must be int32 or int64");
  STD_TORCH_CHECK(x.dim() >= 2 && task_index->dim() == 1 && task_index->size(0) == x.size(0),
                  "task_index must have one entry per sample of x");
}

inline void expect_gradient(const Tensor& g, const Tensor& x) {
  STD_TORCH_CHECK(g.scalar_type() == x.scalar_type() && g.dim() == x.dim(), "g must have x's dtype and shape");
  for (int64_t i = 0; i < x.dim(); ++i) STD_TORCH_CHECK(g.size(i) == x.size(i), "g must have x's dtype and shape");
}

inline void expect_saved(const AdapterLayout& layout, const Tensor& x, const Tensor& z, const Tensor& r,
                         const Tensor& pre_mean, const Tensor& pre_rstd) {
  const std::vector<int64_t> lead = lead_of(x);
  std::vector<int64_t> z_shape(lead);
  z_shape.push_back(layout.b);
  expect("z", z, x.scalar_type(), z_shape);
  if (layout.post_norm) expect("r", r, ScalarType::Float, lead);
  if (!layout.pre_norm) return;
  expect("pre_mean", pre_mean, ScalarType::Float, lead);
  expect("pre_rstd", pre_rstd, ScalarType::Float, lead);
}

inline void expect_generator(const Tensor& E, const Tensor& G, const Tensor& g0) {
  STD_TORCH_CHECK(E.dim() == 3 && G.dim() == 3, "E must be [Q, n, k] and G [Q, P, k]");
  const int64_t Q = E.size(0), n = E.size(1), k = E.size(2), P = G.size(1);
  expect("E", E, ScalarType::Float, {Q, n, k});
  expect("G", G, ScalarType::Float, {Q, P, k});
  expect("g0", g0, ScalarType::Float, {Q, P});
}

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

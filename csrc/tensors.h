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

}  // namespace hyperformer_fast

// The raw ops of the CPU library, and the only file with torch headers. LibTorch's stable ABI: one build serves every
// torch from 2.11 on. No autograd and no fakes here; hyperformer_fast/ops.py has those.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <tuple>
#include <vector>

#include "adapter.h"
#include "cpu/fold.h"

namespace hyperformer_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Below this many multiply-adds a second thread costs more than it saves.
constexpr int64_t kThreadWork = 1 << 16;

int32_t code(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    default:
      return aoti_torch_dtype_float32();
  }
}

// [lead..., tail...], contiguous, on the CPU. Not torch::stable::empty, whose trip through the dispatcher costs
// microseconds.
Tensor empty(const std::vector<int64_t>& lead, std::initializer_list<int64_t> tail, ScalarType dtype) {
  std::vector<int64_t> sizes(lead);
  sizes.insert(sizes.end(), tail);
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), code(dtype), aoti_torch_device_type_cpu(), 0,
                                                         &handle));
  return Tensor(handle);
}

const char* name(ScalarType dtype) {
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

using Folded = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Folded fold(const Tensor& packed, int64_t d, int64_t b, bool pre_norm, bool post_norm, ScalarType dtype) {
  STD_TORCH_CHECK(d >= 1 && b >= 1, "fold: d and b must be at least 1, got d = ", d, " and b = ", b);
  // 2^24 keeps every size below, of order d * b * 8 bytes, far from overflow.
  STD_TORCH_CHECK(d < (1 << 24) && b < (1 << 24), "fold: d and b must be below 16777216, got d = ", d, " and b = ", b);
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Float, "fold: packed must be float32, got ",
                  name(packed.scalar_type()));
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "fold: dtype must be float32, bfloat16 or float16, got ", name(dtype));
  const AdapterLayout layout{d, b, pre_norm, post_norm};
  STD_TORCH_CHECK(packed.dim() >= 1, "fold: packed must be [..., P], got a tensor without dimensions");
  const auto sizes = packed.sizes();
  const int64_t P = sizes[sizes.size() - 1];
  STD_TORCH_CHECK(P == layout.numel(), "fold: packed must have ", layout.numel(), " numbers per adapter for d = ", d,
                  ", b = ", b, ", pre_norm = ", pre_norm, ", post_norm = ", post_norm, "; got ", P);

  const std::vector<int64_t> lead(sizes.begin(), sizes.end() - 1);
  int64_t M = 1;
  for (const int64_t size : lead) M *= size;
  const int64_t V = layout.vectors(), n = post_norm ? b + 1 : 0, s = post_norm ? b : 0;
  Tensor wd = empty(lead, {b, d}, dtype), wg = empty(lead, {d, b}, dtype),
         vectors = empty(lead, {V}, ScalarType::Float);
  Tensor scale = empty(lead, {s}, ScalarType::Float), root = empty(lead, {n, n}, ScalarType::Float);
  Tensor mean = empty(lead, {n}, ScalarType::Float);
  if (M == 0) return {wd, wg, vectors, scale, root, mean};

  const Tensor dense = packed.is_contiguous() ? packed : torch::stable::contiguous(packed);
  const auto* from = static_cast<const float*>(dense.const_data_ptr());
  const Dtype kind = dtype == ScalarType::Float ? Dtype::f32 : dtype == ScalarType::BFloat16 ? Dtype::bf16 : Dtype::f16;
  const int64_t bytes = kind == Dtype::f32 ? 4 : 2;
  auto* to_wd = static_cast<char*>(wd.mutable_data_ptr());
  auto* to_wg = static_cast<char*>(wg.mutable_data_ptr());
  auto* to_vectors = static_cast<float*>(vectors.mutable_data_ptr());
  auto* to_scale = static_cast<float*>(scale.mutable_data_ptr());
  auto* to_root = static_cast<float*>(root.mutable_data_ptr());
  auto* to_mean = static_cast<float*>(mean.mutable_data_ptr());

  const auto body = [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(fold_scratch(layout));
    for (int64_t m = begin; m < end; ++m)
      fold_adapter(from + m * P, layout, kind,
                   {to_wd + m * b * d * bytes, to_wg + m * b * d * bytes, to_vectors + m * V, to_scale + m * s,
                    to_root + m * n * n, to_mean + m * n},
                   scratch.data());
  };
  // Each adapter is one thread's, so that the number of threads changes no bit.
  const int64_t work = d * b * (post_norm ? b + 8 : 2);
  if (M == 1 || M <= kThreadWork / work)
    body(0, M);
  else
    torch::stable::parallel_for(0, M, std::max<int64_t>(1, kThreadWork / work), body);
  return {wd, wg, vectors, scale, root, mean};
}

STABLE_TORCH_LIBRARY(hyperformer_fast_cpu, m) {
  m.def(
      "fold(Tensor packed, int d, int b, bool pre_norm, bool post_norm, ScalarType dtype)"
      " -> (Tensor wd, Tensor wg, Tensor vectors, Tensor scale, Tensor root, Tensor mean)");
}

STABLE_TORCH_LIBRARY_IMPL(hyperformer_fast_cpu, CPU, m) { m.impl("fold", TORCH_BOX(&fold)); }

}  // namespace
}  // namespace hyperformer_fast

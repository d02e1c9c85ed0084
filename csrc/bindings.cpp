// The raw ops of the CPU library. LibTorch's stable ABI: one build serves every torch from 2.11 on. No autograd and no
// fakes here; hyperformer_fast/ops.py has those.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/adapter.h"
#include "cpu/fold.h"
#include "tensors.h"

namespace hyperformer_fast {
namespace {

// Below this many multiply-adds a second thread costs more than it saves.
constexpr int64_t kThreadWork = 1 << 16;

// Memory that malloc maps afresh on every call (above 32 MiB it always does) costs a page fault per 4 KiB, more than
// the kernel's own work; huge pages make that one per 2 MiB. Advice only: where it is not taken, nothing changes.
Tensor empty_rows(const std::vector<int64_t>& lead, int64_t d, ScalarType dtype) {
  Tensor t = empty(lead, {d}, dtype);
#if defined(__linux__)
  constexpr uintptr_t page = 4096, mapped = uintptr_t(32) << 20;
  const uintptr_t bytes = uintptr_t(t.numel()) * (dtype == ScalarType::Float ? 4 : 2);
  if (bytes >= mapped) {
    const uintptr_t first = (reinterpret_cast<uintptr_t>(t.mutable_data_ptr()) + page - 1) / page * page;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(t.mutable_data_ptr()) + bytes) / page * page;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return t;
}

Dtype kind_of(ScalarType dtype) {
  return dtype == ScalarType::Float ? Dtype::f32 : dtype == ScalarType::BFloat16 ? Dtype::bf16 : Dtype::f16;
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
  Tensor wd = empty(lead, {b, d}, dtype), wg = empty(lead, {b, d}, dtype),
         vectors = empty(lead, {V}, ScalarType::Float);
  Tensor scale = empty(lead, {s}, ScalarType::Float), root = empty(lead, {n, n}, ScalarType::Float);
  Tensor mean = empty(lead, {n}, ScalarType::Float);
  if (M == 0) return {wd, wg, vectors, scale, root, mean};

  const Tensor dense = packed.is_contiguous() ? packed : torch::stable::contiguous(packed);
  const auto* from = static_cast<const float*>(dense.const_data_ptr());
  const Dtype kind = kind_of(dtype);
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

// Rows of a [..., d] tensor whose last dimension is contiguous, read where they lie; any other is copied once.
struct RowView {
  Tensor keep;
  std::vector<int64_t> offset;

  explicit RowView(const Tensor& t)
      : keep(t.size(t.dim() - 1) > 1 && t.stride(t.dim() - 1) != 1 ? torch::stable::contiguous(t) : t) {
    const int64_t dims = keep.dim() - 1;
    int64_t n = 1;
    for (int64_t i = 0; i < dims; ++i) n *= keep.size(i);
    offset.resize(n);
    if (n == 0) return;
    offset[0] = 0;
    int64_t filled = 1;
    for (int64_t i = dims - 1; i >= 0; --i) {
      const int64_t size = keep.size(i), stride = keep.stride(i);
      for (int64_t k = 1; k < size; ++k)
        for (int64_t j = 0; j < filled; ++j) offset[k * filled + j] = offset[j] + k * stride;
      filled *= size;
    }
  }

  Rows rows() const { return {keep.const_data_ptr(), offset.data()}; }
};

Problem problem_of(const Tensor& x, int64_t T, const std::optional<Tensor>& task_index, int64_t d, int64_t b,
                   bool pre_norm, bool post_norm, int64_t activation, std::vector<int64_t>& tasks) {
  expect_rows(x, T, task_index, d, b, activation);
  const auto sizes = x.sizes();
  int64_t n = 1;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) n *= sizes[i];
  Problem p{{d, b, pre_norm, post_norm}, int(activation), kind_of(x.scalar_type()), 1, n, T, nullptr};
  if (!task_index.has_value()) return p;
  const Tensor index = task_index->is_contiguous() ? *task_index : torch::stable::contiguous(*task_index);
  p.B = sizes[0];
  p.M = p.B == 0 ? 0 : n / p.B;
  tasks.resize(p.B);
  const bool wide = index.scalar_type() == ScalarType::Long;
  for (int64_t i = 0; i < p.B; ++i) {
    tasks[i] = wide ? static_cast<const int64_t*>(index.const_data_ptr())[i]
                    : static_cast<const int32_t*>(index.const_data_ptr())[i];
    STD_TORCH_CHECK(tasks[i] >= -1 && tasks[i] < T, "task_index must be from -1 to ", T - 1, ", got ", tasks[i]);
  }
  p.task = tasks.data();
  return p;
}

void run_parallel(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  if (count <= 1) {
    if (count == 1) body(0, 1);
    return;
  }
  torch::stable::parallel_for(0, count, 1, body);
}

FoldedWeights folded_of(const Tensor& wd, const Tensor& wg, const Tensor& vectors, const Tensor& scale,
                        const Tensor& root, const Tensor& mean) {
  const auto f = [](const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); };
  return {wd.const_data_ptr(), wg.const_data_ptr(), f(vectors), f(scale), f(root), f(mean)};
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward adapter_forward_op(const Tensor& x, const Tensor& wd, const Tensor& wg, const Tensor& vectors,
                           const Tensor& scale, const Tensor& root, const Tensor& mean,
                           std::optional<Tensor> task_index, int64_t d, int64_t b, bool pre_norm, bool post_norm,
                           int64_t activation, bool save) {
  const ScalarType dtype = x.scalar_type();
  const std::vector<int64_t> lead = lead_of(x), none;
  std::vector<int64_t> tasks;
  const Problem p = problem_of(x, tasks_of(wd), task_index, d, b, pre_norm, post_norm, activation, tasks);
  expect_folded(p.layout, p.T, dtype, wd, wg, vectors, scale, root, mean);
  Tensor out = empty_rows(lead, d, dtype), z = save ? empty(lead, {b}, dtype) : empty(none, {0}, dtype);
  const auto statistic = [&](bool on) {
    return save && on ? empty(lead, {}, ScalarType::Float) : empty(none, {0}, ScalarType::Float);
  };
  Tensor r = statistic(post_norm), pre_mean = statistic(pre_norm), pre_rstd = statistic(pre_norm);
  if (p.B * p.M == 0) return {out, z, r, pre_mean, pre_rstd};
  const RowView rows(x);
  const auto f = [&](Tensor& t, bool on) { return save && on ? static_cast<float*>(t.mutable_data_ptr()) : nullptr; };
  const SavedRows saved{save ? z.mutable_data_ptr() : nullptr, f(r, post_norm), f(pre_mean, pre_norm),
                        f(pre_rstd, pre_norm)};
  adapter_forward(p, rows.rows(), folded_of(wd, wg, vectors, scale, root, mean), out.mutable_data_ptr(), saved,
                  run_parallel);
  return {out, z, r, pre_mean, pre_rstd};
}

std::tuple<Tensor, Tensor> adapter_backward_op(const Tensor& g, const Tensor& x, const Tensor& z, const Tensor& r,
                                               const Tensor& pre_mean, const Tensor& pre_rstd, const Tensor& packed,
                                               const Tensor& wd, const Tensor& wg, const Tensor& vectors,
                                               const Tensor& scale, const Tensor& root, const Tensor& mean,
                                               std::optional<Tensor> task_index, int64_t d, int64_t b, bool pre_norm,
                                               bool post_norm, int64_t activation, bool need_dx, bool need_dpacked) {
  const std::vector<int64_t> lead = lead_of(x), none;
  std::vector<int64_t> tasks;
  const Problem p = problem_of(x, tasks_of(wd), task_index, d, b, pre_norm, post_norm, activation, tasks);
  expect_folded(p.layout, p.T, x.scalar_type(), wd, wg, vectors, scale, root, mean);
  expect("packed", packed, ScalarType::Float, {p.T, p.layout.numel()});
  expect_saved(p.layout, x, z, r, pre_mean, pre_rstd);
  expect_gradient(g, x);
  Tensor dx = need_dx ? empty_rows(lead, d, x.scalar_type()) : empty(none, {0}, x.scalar_type());
  Tensor dpacked =
      need_dpacked ? empty({p.T}, {p.layout.numel()}, ScalarType::Float) : empty(none, {0}, ScalarType::Float);
  const RowView gr(g), xr(x);
  const auto f = [&](const Tensor& t) { return static_cast<float*>(const_cast<void*>(t.const_data_ptr())); };
  const SavedRows saved{const_cast<void*>(z.const_data_ptr()), f(r), f(pre_mean), f(pre_rstd)};
  adapter_backward(p, gr.rows(), xr.rows(), saved, f(packed), folded_of(wd, wg, vectors, scale, root, mean),
                   need_dx ? dx.mutable_data_ptr() : nullptr, need_dpacked ? f(dpacked) : nullptr, run_parallel);
  return {dx, dpacked};
}

Tensor generate_weights_op(const Tensor& E, const Tensor& G, const Tensor& g0) {
  expect_generator(E, G, g0);
  const int64_t Q = E.size(0), n = E.size(1), k = E.size(2), P = G.size(1);
  Tensor packed = empty({Q}, {n, P}, ScalarType::Float);
  if (Q * n * P == 0) return packed;
  const auto f = [](const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); };
  auto* to = static_cast<float*>(packed.mutable_data_ptr());
  for (int64_t q = 0; q < Q; ++q)
    generate_weights(f(E) + q * n * k, f(G) + q * P * k, f(g0) + q * P, n, P, k, to + q * n * P, run_parallel);
  return packed;
}

using HyperAdapter =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Generation, folding and application of one site: what the three ops give, in one call.
HyperAdapter hyper_adapter_op(const Tensor& x, const Tensor& E, const Tensor& G, const Tensor& g0,
                              std::optional<Tensor> task_index, int64_t d, int64_t b, bool pre_norm, bool post_norm,
                              int64_t activation, bool save) {
  expect_sizes(d, b);
  const AdapterLayout layout{d, b, pre_norm, post_norm};
  expect_site_generator(layout, E, G, g0);
  const int64_t T = E.size(0), k = E.size(1), P = layout.numel();
  const auto f = [](const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); };
  Tensor packed = empty({T}, {P}, ScalarType::Float);
  if (T > 0) generate_weights(f(E), f(G), f(g0), T, P, k, static_cast<float*>(packed.mutable_data_ptr()), run_parallel);
  const auto [wd, wg, vectors, scale, root, mean] = fold(packed, d, b, pre_norm, post_norm, x.scalar_type());
  const auto [out, z, r, pre_mean, pre_rstd] = adapter_forward_op(x, wd, wg, vectors, scale, root, mean, task_index, d,
                                                                  b, pre_norm, post_norm, activation, save);
  return {out, z, r, pre_mean, pre_rstd, packed, wd, wg, vectors, scale, root, mean};
}

// 0 portable, 1 AVX2, 2 AVX-512, 3 AVX-512 with bfloat16 products.
int64_t instruction_set_op() {
  const std::string set = instruction_set();
  return set == "avx512_bf16" ? 3 : set == "avx512" ? 2 : set == "avx2" ? 1 : 0;
}

STABLE_TORCH_LIBRARY(hyperformer_fast_cpu, m) {
  m.def("instruction_set() -> int");
  define_ops(m);
}

STABLE_TORCH_LIBRARY_IMPL(hyperformer_fast_cpu, CPU, m) {
  m.impl("fold", TORCH_BOX(&fold));
  m.impl("adapter_forward", TORCH_BOX(&adapter_forward_op));
  m.impl("adapter_backward", TORCH_BOX(&adapter_backward_op));
  m.impl("generate_weights", TORCH_BOX(&generate_weights_op));
  m.impl("hyper_adapter", TORCH_BOX(&hyper_adapter_op));
}

STABLE_TORCH_LIBRARY_IMPL(hyperformer_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set_op));
}

}  // namespace
}  // namespace hyperformer_fast
